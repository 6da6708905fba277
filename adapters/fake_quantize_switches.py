"""What the fake-quantize classes of torch.ao and of torchao share: the frameworks' own switches.

The two frameworks have base classes of their own and the same protocol; each mixin goes before the
quantizer and the framework's base.
"""

from typing import Any

from torch import Tensor

from tdq_plugin.errors import AdapterError
from tdq_plugin.quantizer import ActivationQuantizer, QuantizerMode
from tdq_plugin.weights import WeightQuantizer

__all__ = ["ActivationSwitches", "WeightSwitches"]


class ActivationSwitches(ActivationQuantizer):
    """`enable_fake_quant` and `disable_fake_quant` for activations, also through state dicts.

    Attributes:
        own_convert: Name of this package's convert for the framework.
    """

    own_convert: str
    fake_quant_enabled: Tensor

    @property
    def mode(self) -> QuantizerMode:
        """As of `ActivationQuantizer`; whether it is `off` is in the state dict, too."""
        return self._mode

    @mode.setter
    def mode(self, mode: QuantizerMode) -> None:
        self._mode = mode
        self.fake_quant_enabled.fill_(mode != "off")

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Quantize, or let activations pass."""
        if not enabled:
            self.mode = "off"
        elif self.mode == "off":
            self.mode = "quantize"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.enable_fake_quant(bool(self.fake_quant_enabled))

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Refused: a single scale would throw the timestep away.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            "A TDQ activation has no single scale, so the framework's own convert cannot take it. "
            f"Use {self.own_convert}."
        )


class WeightSwitches(WeightQuantizer):
    """The same for weights; like the frameworks' own, they take scales from the first weight."""

    fake_quant_enabled: Tensor

    @property
    def enabled(self) -> bool:
        """Whether the weight is quantized; it is in the state dict, too."""
        return self._enabled

    @enabled.setter
    def enabled(self, enabled: bool) -> None:
        self._enabled = enabled
        self.fake_quant_enabled.fill_(enabled)

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Quantize, or let the weight pass."""
        self.enabled = enabled

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.enabled = bool(self.fake_quant_enabled)

    def forward(self, weight: Tensor) -> Tensor:
        if self.scale.numel() == 0:
            self.initialise(weight)
        return super().forward(weight)

    def calculate_qparams(self, **_: Any) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the output channels."""
        return self.positive_scale().detach(), self.zero_point.long()
