"""From observed values to a scale and a zero point."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.options import check_option
from tdq_plugin.scales.bank import SCALE_FLOOR

__all__ = ["RangeMethod", "affine_range", "search_range", "search_scale"]

RangeMethod = Literal["minmax", "percentile", "mse"]
_FACTORS = torch.linspace(0.15, 1.05, 46)


def search_range(
    values: Tensor,
    grid: QuantizationGrid,
    method: RangeMethod = "mse",
    percentile: float = 99.9,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Choose a scale and a zero point for each row of values.

    Args:
        values: Samples of an activation or weight, shape `(R, K)`.
        grid: The integer codes.
        method: `minmax` covers all values, `percentile` leaves the outermost ones out, `mse`
            minimises the squared rounding error over shrunken ranges.
        percentile: Share of values inside the range, in percent.
        limits: True minima and maxima, shape `(R, 2)`, where `values` is only a sample.

    Returns:
        Scales and integer valued zero points, both of shape `(R,)`.

    Example:
        >>> from tdq_plugin.grid import activation_grid
        >>> values = torch.tensor([[-1.0, 2.0]])
        >>> search_range(values, activation_grid(2), "minmax")
        (tensor([1.]), tensor([1.]))
    """
    low, high = _outer_range(values, method, percentile, limits)
    if method != "mse":
        return affine_range(low, high, grid)
    best_scale, best_zero = affine_range(low, high, grid)
    best_error = rounding_error(values, best_scale, best_zero, grid)
    for factor in _FACTORS.tolist():
        scale, zero_point = affine_range(low * factor, high * factor, grid)
        error = rounding_error(values, scale, zero_point, grid)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_zero = torch.where(better, zero_point, best_zero)
    return best_scale, best_zero


def affine_range(low: Tensor, high: Tensor, grid: QuantizationGrid) -> tuple[Tensor, Tensor]:
    """The scale and the zero point whose codes cover `low .. high`.

    Args:
        low: Minima, 0 or less.
        high: Maxima, 0 or more; of the same shape.
        grid: The integer codes.

    Returns:
        A scale and an integer valued zero point for each pair of limits.

    Example:
        >>> affine_range(torch.tensor(-1.0), torch.tensor(2.0), QuantizationGrid(0, 3))
        (tensor(1.), tensor(1.))
    """
    if grid.symmetric:
        zero_point = torch.zeros_like(low)
        return _covering_scale(low, high, zero_point, grid), zero_point
    scale = ((high - low) / (grid.quant_max - grid.quant_min)).clamp(min=SCALE_FLOOR)
    zero_point = (grid.quant_min - (low / scale).round()).clamp(grid.quant_min, grid.quant_max)
    return scale, zero_point


def search_scale(
    values: Tensor,
    zero_point: Tensor,
    grid: QuantizationGrid,
    method: RangeMethod = "mse",
    percentile: float = 99.9,
    limits: Tensor | None = None,
) -> Tensor:
    """As `search_range`, for a zero point that is given, shape `(R,)`; returns scales `(R,)`."""
    low, high = _outer_range(values, method, percentile, limits)
    full = _covering_scale(low, high, zero_point, grid)
    if method != "mse":
        return full
    best_error, best_scale = rounding_error(values, full, zero_point, grid), full
    for factor in _FACTORS.tolist():
        scale = (full * factor).clamp(min=SCALE_FLOOR)
        error = rounding_error(values, scale, zero_point, grid)
        best_scale = torch.where(error < best_error, scale, best_scale)
        best_error = torch.minimum(error, best_error)
    return best_scale


def rounding_error(
    values: Tensor, scale: Tensor, zero_point: Tensor, grid: QuantizationGrid
) -> Tensor:
    """Mean squared difference of each row `(R, K)` to its quantized self, shape `(R,)`."""
    step, zero = scale[:, None], zero_point[:, None]
    codes = (values / step).round_().add_(zero).clamp_(grid.quant_min, grid.quant_max)
    return codes.sub_(zero).mul_(step).sub_(values).square_().mean(dim=1)


def _outer_range(
    values: Tensor, method: RangeMethod, percentile: float, limits: Tensor | None
) -> tuple[Tensor, Tensor]:
    check_option("method", method, get_args(RangeMethod))
    if method == "percentile":
        tail = (1 - percentile / 100) / 2
        edges = values.quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype), dim=1)
        low, high = edges[0], edges[1]
    elif limits is not None:
        low, high = limits[:, 0], limits[:, 1]
    else:
        low, high = values.amin(dim=1), values.amax(dim=1)
    # Zero must be a code: convolutions pad with it.
    return low.clamp(max=0.0), high.clamp(min=0.0)


def _covering_scale(
    low: Tensor, high: Tensor, zero_point: Tensor, grid: QuantizationGrid
) -> Tensor:
    above, below = grid.quant_max - zero_point, zero_point - grid.quant_min
    # No scale covers the values on a side of zero that has no codes: they do not count.
    needed_above = torch.where(above > 0, high / above, torch.zeros_like(high))
    needed_below = torch.where(below > 0, -low / below, torch.zeros_like(low))
    return torch.maximum(needed_above, needed_below).clamp(min=SCALE_FLOOR)
