"""The integer grid of a quantizer: its name, its code range, and whether it is symmetric."""

from dataclasses import dataclass, replace

from tdq_plugin.errors import ConfigError

__all__ = ["QuantizationGrid", "activation_grid", "check_bits", "weight_grid"]


@dataclass(frozen=True)
class QuantizationGrid:
    """Integer codes `quant_min .. quant_max`.

    Attributes:
        quant_min: Smallest code.
        quant_max: Largest code.
        symmetric: The zero point is fixed at 0 and is not learned.

    Raises:
        ConfigError: The range is empty or does not fit into 8 bits.

    Example:
        >>> activation_grid(4)
        QuantizationGrid(quant_min=0, quant_max=15, symmetric=False)
    """

    quant_min: int
    quant_max: int
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not self.quant_min < self.quant_max or self.quant_max - self.quant_min > 255:
            raise ConfigError(
                f"Codes {self.quant_min} .. {self.quant_max} are not a range of 2 to 8 bits."
            )

    @property
    def bits(self) -> int:
        """Number of bits that the codes need."""
        return (self.quant_max - self.quant_min).bit_length()

    @property
    def signed(self) -> bool:
        """Whether there are negative codes."""
        return self.quant_min < 0


def activation_grid(bits: int, symmetric: bool = False) -> QuantizationGrid:
    """The grid of an activation: unsigned with a zero point, or signed and symmetric."""
    check_bits(bits)
    if symmetric:
        return QuantizationGrid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, symmetric=True)
    return QuantizationGrid(0, 2**bits - 1)


def weight_grid(bits: int, symmetric: bool = True) -> QuantizationGrid:
    """The grid of a weight: signed, without or with a zero point."""
    return replace(activation_grid(bits, symmetric=True), symmetric=symmetric)


def check_bits(*numbers: int | None) -> None:
    """See that all numbers of bits are supported; None stands for no choice.

    Raises:
        ConfigError: One is no whole number from 2 to 8.
    """
    for bits in numbers:
        if bits is not None and not (isinstance(bits, int) and 2 <= bits <= 8):
            raise ConfigError(f"{bits!r} bits are not supported. Choose 2 to 8.")
