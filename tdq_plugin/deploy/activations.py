"""Quantizers of an int8 model: activations become uint8 codes, or quantized floats."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tdq_plugin.fake_quantize import per_sample
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.ranges import affine_range

__all__ = [
    "Codes",
    "DynamicCodes",
    "DynamicValues",
    "QuantizerRow",
    "TableCodes",
    "TableValues",
    "int8_shift",
    "uint8_shift",
]


class QuantizerRow(NamedTuple):
    """What one quantizer needs to know about the timestep; every entry has shape `()` or `(B,)`.

    Attributes:
        scale: Float32.
        reciprocal: `1 / scale`.
        offset: The zero point as an int8 value, `zero_point - int8_shift(grid)`, float32.
        zero_point: The zero point as a uint8 code, `zero_point + uint8_shift(grid)`, int32.
    """

    scale: Tensor
    reciprocal: Tensor
    offset: Tensor
    zero_point: Tensor


class Codes(NamedTuple):
    """A quantized activation: `(values - zero_point) * scale`.

    Attributes:
        values: Uint8.
        scale: Float32, shape `()` or `(B,)`.
        zero_point: Int32, shape `()` or `(B,)`.
    """

    values: Tensor
    scale: Tensor
    zero_point: Tensor


def int8_shift(grid: QuantizationGrid) -> int:
    """What is taken off a grid's codes so that they fit into int8."""
    return 128 if grid.quant_max > 127 else 0


def uint8_shift(grid: QuantizationGrid) -> int:
    """What is added to a grid's codes so that they fit into uint8."""
    return 128 if grid.signed else 0


class _Quantizer(nn.Module):
    def __init__(self, grid: QuantizationGrid) -> None:
        super().__init__()
        self.grid = grid
        shift = int8_shift(grid)
        self.low, self.high = grid.quant_min - shift, grid.quant_max - shift
        self.flips_sign = uint8_shift(grid) + shift != 0

    def int8_values(self, x: Tensor, reciprocal: Tensor, offset: Tensor) -> Tensor:
        # Rounded before the zero point is added, as the fake quantization that was trained:
        # torch.quantize_per_tensor adds first and moves ties. A scale of shape `()` would leave the
        # division in half precision.
        return x.float().mul(reciprocal).round_().add_(offset).clamp_(self.low, self.high)

    def uint8_codes(self, int8_values: Tensor) -> Tensor:
        # By way of int8: the conversion from float to uint8 is five times slower.
        codes = int8_values.to(torch.int8).view(torch.uint8)
        return codes.bitwise_xor_(128) if self.flips_sign else codes


class TableCodes(_Quantizer):
    """Codes by a row of the scale table, bit-equal to `tdq_plugin.fake_quantize.quantize`.

    Args:
        grid: The integer codes.
    """

    def forward(self, x: Tensor, row: QuantizerRow) -> Codes:
        """Quantize an activation with samples along dimension 0."""
        scale, reciprocal, offset, zero_point = row
        if scale.dim():
            reciprocal, offset = per_sample(reciprocal, x), per_sample(offset, x)
        values = self.uint8_codes(self.int8_values(x, reciprocal, offset))
        return Codes(values, scale, zero_point)


class TableValues(_Quantizer):
    """Quantized floats for operations that have no integer kernel, such as attention."""

    def forward(self, x: Tensor, row: QuantizerRow) -> Tensor:
        """Quantize and dequantize; bit-equal to `fake_quantize`."""
        scale, reciprocal, offset, _ = row
        if scale.dim():
            scale, reciprocal = per_sample(scale, x), per_sample(reciprocal, x)
            offset = per_sample(offset, x)
        return self.int8_values(x, reciprocal, offset).sub_(offset).mul_(scale)


class DynamicCodes(_Quantizer):
    """The input-dependent baseline: a scale from each batch's own minimum and maximum."""

    def forward(self, x: Tensor) -> Codes:
        """As `TableCodes.forward`."""
        scale, reciprocal, offset, zero_point = _dynamic_row(x, self.grid)
        values = self.uint8_codes(self.int8_values(x, reciprocal, offset))
        return Codes(values, scale, zero_point)


class DynamicValues(_Quantizer):
    """As `DynamicCodes`, for operations that have no integer kernel."""

    def forward(self, x: Tensor) -> Tensor:
        """As `TableValues.forward`."""
        scale, reciprocal, offset, _ = _dynamic_row(x, self.grid)
        return self.int8_values(x, reciprocal, offset).sub_(offset).mul_(scale)


def _dynamic_row(x: Tensor, grid: QuantizationGrid) -> QuantizerRow:
    """The row that fits the minimum and maximum of the whole of `x`."""
    # An empty batch has no limits.
    low, high = x.float().aminmax() if x.numel() else x.new_zeros(2)
    scale, zero_point = affine_range(low.clamp(max=0), high.clamp(min=0), grid)
    code = (zero_point + uint8_shift(grid)).to(torch.int32)
    return QuantizerRow(scale, 1 / scale, zero_point - int8_shift(grid), code)
