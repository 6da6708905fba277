"""What conversion did to the scales and the layers of a model."""

import warnings
from dataclasses import dataclass

from tdq_plugin.deploy.halves import has_32_bit_sums

__all__ = ["ConversionReport"]


@dataclass(frozen=True)
class ConversionReport:
    """What `to_openvino` did.

    Attributes:
        readers_left: By the name of each quantizer whose scale moves with t, the operations that
            its scale could not be moved behind. They compute in float.
        integer_layers: Layers that run on int8 kernels on this machine.
        lost_layers: Layers that run on int8 kernels with static scales, but not here.
    """

    readers_left: dict[str, list[str]]
    integer_layers: list[str]
    lost_layers: list[str]

    @property
    def moved(self) -> list[str]:
        """Quantizers whose scale was moved behind everything that reads them."""
        return [name for name, readers in self.readers_left.items() if not readers]

    def __str__(self) -> str:
        """A few lines for people.

        Example:
            >>> left = {"conv.input": [], "product.0.0": ["Softmax"]}
            >>> print(ConversionReport(left, ["conv"], []))
            1 of 2 scales moved behind their layers, 1 layer on int8 kernels
              product.0.0 stays in front of Softmax
        """
        layers = f"{len(self.integer_layers)} layer{'s' * (len(self.integer_layers) != 1)}"
        lines = [
            f"{len(self.moved)} of {len(self.readers_left)} scales moved behind their layers, "
            f"{layers} on int8 kernels"
        ]
        lines += [
            f"  {name} stays in front of {', '.join(readers)}"
            for name, readers in self.readers_left.items()
            if readers
        ]
        return "\n".join(lines)

    def warn(self) -> None:
        """Warn of layers that lost their integer kernel, and of a CPU whose sums have 16 bits."""
        if self.integer_layers and not has_32_bit_sums():
            warnings.warn(
                "This CPU has no VNNI: OpenVINO's int8 kernels add pairs of products in 16 bits "
                "and cut off sums that do not fit, so layers with 8 bits on both sides may give "
                "other values here. Run the model on a CPU with VNNI, or prepare it with weights "
                "of 7 bits.",
                stacklevel=3,
            )
        if self.lost_layers:
            warnings.warn(
                "With static scales, these layers would run on int8 kernels; with scales of the "
                f"timestep they run in float: {', '.join(self.lost_layers)}. Their values are "
                "right, their speed is not; `readers_left` of the report says what stands in the "
                "way.",
                stacklevel=3,
            )
