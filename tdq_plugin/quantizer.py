"""The activation quantizer that every adapter uses: it sees `x` and its own scale, never t."""

from typing import Literal

import torch
from torch import Tensor, nn

from tdq_plugin.errors import AdapterError
from tdq_plugin.fake_quantize import fake_quantize
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.scales.bank import SCALE_FLOOR

__all__ = ["ActivationQuantizer", "QuantizerMode", "dynamic_range"]

QuantizerMode = Literal["quantize", "observe", "off", "dynamic"]


class ActivationQuantizer(nn.Module):
    """Fake quantization of one activation, by a scale that a scale bank gives.

    Args:
        grid: The integer codes.

    Attributes:
        name: Its row in the scale bank; set by `tdq_plugin.attach`.
        mode: `quantize` by the given scale, `observe` and pass `x` through, `off`, or `dynamic`:
            ignore the given scale and take each sample's own minimum and maximum (the
            input-dependent baseline).
        observed: Activations seen in mode `observe` since they were last taken away.
    """

    def __init__(self, grid: QuantizationGrid) -> None:
        super().__init__()
        self.grid = grid
        self.name: str | None = None
        self.mode: QuantizerMode = "quantize"
        self.observed: list[Tensor] = []

    def forward(
        self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        """Quantize and dequantize `x`.

        Args:
            x: Activation, samples along dimension 0.
            scale: Shape `(B,)`.
            zero_point: Shape `(B,)`.

        Raises:
            AdapterError: No scale was given, so the model is not attached to a scale bank.
        """
        if self.mode == "off":
            return x
        if self.mode == "observe":
            self.observed.append(x.detach())
            return x
        if self.mode == "dynamic":
            scale, zero_point = dynamic_range(x, self.grid)
        if scale is None or zero_point is None:
            raise AdapterError(
                "An activation quantizer was called without a scale. "
                "Call tdq_plugin.attach(model) after the framework's prepare step."
            )
        return fake_quantize(x, scale, zero_point, self.grid.quant_min, self.grid.quant_max)


def dynamic_range(x: Tensor, grid: QuantizationGrid) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each sample from its own minimum and maximum, shape `(B,)` each."""
    flat = x.detach().reshape(x.shape[0], -1)
    low, high = flat.amin(dim=1).clamp(max=0), flat.amax(dim=1).clamp(min=0)
    if grid.symmetric:
        scale = torch.maximum(high / grid.quant_max, low / grid.quant_min)
        return scale.clamp(min=SCALE_FLOOR), torch.zeros_like(scale)
    scale = ((high - low) / (grid.quant_max - grid.quant_min)).clamp(min=SCALE_FLOOR)
    return scale, (grid.quant_min - (low / scale).round()).clamp(grid.quant_min, grid.quant_max)
