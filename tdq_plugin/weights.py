"""The weight quantizer that every adapter uses: symmetric, one learned scale per output channel."""

import torch
from torch import Tensor, nn

from tdq_plugin.errors import CalibrationError
from tdq_plugin.fake_quantize import fake_quantize, quantize
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.ranges import RangeMethod, search_range
from tdq_plugin.scales.bank import SCALE_FLOOR

__all__ = ["WeightQuantizer"]


class WeightQuantizer(nn.Module):
    """Fake quantization of a weight along its output channels, with LSQ gradients.

    Args:
        grid: The integer codes, symmetric.

    Attributes:
        scale: Shape `(output channels,)`; empty until `initialise` or a state dict sets it.
        enabled: Whether the weight is quantized.
    """

    def __init__(self, grid: QuantizationGrid) -> None:
        super().__init__()
        self.grid = grid
        self.scale = nn.Parameter(torch.empty(0))
        self.enabled = True

    def initialise(self, weight: Tensor, method: RangeMethod = "mse") -> None:
        """Set the scales from a weight `(output channels, ...)`; `mse` is the optimal clipping."""
        scale, _ = search_range(weight.detach().flatten(1).float(), self.grid, method)
        self.scale.data = scale.to(weight.device)

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize a weight."""
        if not self.enabled:
            return weight
        scale = self.positive_scale()
        return fake_quantize(
            weight, scale, torch.zeros_like(scale), self.grid.quant_min, self.grid.quant_max
        )

    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes of a weight, int8."""
        scale = self.positive_scale().detach()
        codes = quantize(
            weight.detach().float(),
            scale,
            torch.zeros_like(scale),
            self.grid.quant_min,
            self.grid.quant_max,
        )
        return codes.to(torch.int8)

    def positive_scale(self) -> Tensor:
        """The scales, kept away from zero.

        Raises:
            CalibrationError: They were never set.
        """
        if self.scale.numel() == 0:
            raise CalibrationError(
                "A weight quantizer has no scale yet. Call tdq_plugin.attach(model), which sets "
                "it from the weight, or load a state dict."
            )
        return self.scale.clamp(min=SCALE_FLOOR)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "scale")
        if saved is not None and self.scale.shape != saved.shape:
            self.scale.data = self.scale.data.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
