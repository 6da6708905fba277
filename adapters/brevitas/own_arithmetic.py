"""Brevitas' own arithmetic, as an option: its division, its gradients, no LSQ gradient scale."""

import torch
from torch import Tensor, nn

from tdq_plugin.fake_quantize import StepGradient, per_sample
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.quantizer import ActivationQuantizer

__all__ = ["BrevitasActivationQuantizer"]


class BrevitasActivationQuantizer(ActivationQuantizer):
    """An activation quantizer that computes by Brevitas' `IntQuant`.

    Where `x / scale` lies within a rounding error of a tie, the code may differ by one from that
    of the other adapters, which multiply by `1 / scale` as torch does.

    Args:
        grid: The integer codes.
        int_quant: Brevitas' implementation for the grid.
        bit_width_impl: Returns the bits of the grid.
    """

    def __init__(
        self, grid: QuantizationGrid, int_quant: nn.Module, bit_width_impl: nn.Module
    ) -> None:
        super().__init__(grid)
        self.int_quant, self.bit_width_impl = int_quant, bit_width_impl

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor, gradient: StepGradient) -> Tensor:
        step, zero = per_sample(scale, x), per_sample(zero_point, x)
        # Scales stay float32 in a model of lower precision; one scale computes as one per sample.
        wide = x.to(torch.promote_types(x.dtype, step.dtype))
        quantized: Tensor = self.int_quant(step, zero, self.bit_width_impl(), wide)
        return quantized.to(x.dtype)
