"""Codes are those of the fake quantization that was trained, bit for bit."""

import pytest
import torch

from tdq_plugin import activation_grid
from tdq_plugin.deploy.activations import (
    DynamicCodes,
    DynamicValues,
    QuantizerRow,
    TableCodes,
    TableValues,
    int8_shift,
    uint8_shift,
)
from tdq_plugin.fake_quantize import fake_quantize, quantize
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.quantizer import dynamic_range

GRIDS = [activation_grid(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]


def row(grid, scale, zero_point):
    codes = (zero_point + uint8_shift(grid)).to(torch.int32)
    return QuantizerRow(scale, 1 / scale, zero_point - int8_shift(grid), codes)


def values_with_ties(grid, scale):
    steps = torch.arange(-2 * 255, 2 * 255 + 1) / 2
    x = steps.reshape(1, -1) * scale.reshape(-1, 1)
    return torch.cat([x, x.nextafter(x + 1), x.nextafter(x - 1), 1e6 * x], dim=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("scale", [torch.tensor(0.037), torch.tensor([0.037, 1.7, 0.25])])
def test_codes_and_values_are_bit_equal_to_fake_quantization(grid, scale):
    zero = torch.tensor(0.0 if grid.symmetric else float(grid.quant_max // 2))
    x = values_with_ties(grid, scale)
    expected = quantize(x, scale, zero.expand(scale.shape), grid.quant_min, grid.quant_max)
    codes = TableCodes(grid)(x, row(grid, scale, zero))
    assert codes.values.dtype == torch.uint8
    assert torch.equal(codes.values.float() - codes.zero_point, expected - zero)
    assert expected.unique().numel() == grid.quant_max - grid.quant_min + 1
    floats = fake_quantize(x, scale, zero.expand(scale.shape), grid.quant_min, grid.quant_max)
    assert torch.equal(TableValues(grid)(x, row(grid, scale, zero)), floats)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [torch.tensor(0.037), torch.tensor([0.037, 1.7, 0.25])])
def test_half_precision_is_quantized_in_float32(dtype, scale):
    grid, zero = activation_grid(8), torch.tensor(117.0)
    x = values_with_ties(grid, scale).clamp(-1e4, 1e4).to(dtype)
    entry = row(grid, scale, zero)
    expected = TableCodes(grid)(x.float(), entry).values
    assert torch.equal(TableCodes(grid)(x, entry).values, expected)
    assert torch.equal(TableValues(grid)(x, entry), TableValues(grid)(x.float(), entry))
    assert torch.equal(DynamicCodes(grid)(x).values, DynamicCodes(grid)(x.float()).values)
    assert torch.equal(DynamicValues(grid)(x), DynamicValues(grid)(x.float()))


def test_torch_quantize_per_tensor_would_not_be_bit_equal():
    grid, scale, zero = activation_grid(8), torch.tensor(0.037), torch.tensor(117.0)
    x = values_with_ties(grid, scale)
    with pytest.warns(UserWarning, match="deprecated"):
        theirs = torch.quantize_per_tensor(x, 0.037, 117, torch.quint8).int_repr()
    assert not torch.equal(TableCodes(grid)(x, row(grid, scale, zero)).values, theirs)


def test_an_empty_batch_has_no_range():
    x, grid = torch.zeros(0, 3), activation_grid(8)
    assert DynamicValues(grid)(x).shape == (0, 3)
    assert DynamicCodes(grid)(x).values.shape == (0, 3)


@pytest.mark.parametrize("grid", [*GRIDS, QuantizationGrid(0, 255, symmetric=True)], ids=str)
@pytest.mark.parametrize("positive", [False, True])
def test_dynamic_ranges_are_those_of_the_dynamic_quantizer(grid, positive):
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(0)) + 1
    x = x.abs() if positive else x
    scale, zero_point = dynamic_range(x, grid)
    expected = fake_quantize(x, scale, zero_point, grid.quant_min, grid.quant_max)
    assert expected.isfinite().all()
    assert torch.equal(DynamicValues(grid)(x), expected)
    codes = DynamicCodes(grid)(x)
    dequantized = (codes.values.to(torch.float32) - codes.zero_point) * codes.scale
    assert torch.equal(dequantized, expected)
