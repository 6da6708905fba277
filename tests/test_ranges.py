"""How a range becomes a scale: it covers, it leaves out outliers, or it has the smallest error."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tdq_plugin.errors import ConfigError
from tdq_plugin.fake_quantize import fake_quantize
from tdq_plugin.grid import QuantizationGrid, activation_grid, weight_grid
from tdq_plugin.ranges import rounding_error, search_range, search_scale
from tdq_plugin.scales.bank import SCALE_FLOOR

GRIDS = [activation_grid(4), activation_grid(8), weight_grid(4), weight_grid(8)]
METHODS = ["minmax", "percentile", "mse"]


def sample(rows: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 2000, generator=torch.Generator().manual_seed(seed)) * 2 + 1


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_minmax_covers_all_values(grid: QuantizationGrid) -> None:
    values = sample()
    scale, zero_point = search_range(values, grid, "minmax")
    for row in range(3):
        low, high = grid.quant_min, grid.quant_max
        output = fake_quantize(values[row], scale[row], zero_point[row], low, high)
        # Rounding the zero point moves the range by up to half a step.
        assert (output - values[row]).abs().max() <= scale[row] * 1.001


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_zero_is_a_code_and_the_scale_is_positive(grid: QuantizationGrid, method: str) -> None:
    values = torch.stack([sample(1)[0] + 20, sample(1)[0] - 20, torch.zeros(2000)])
    scale, zero_point = search_range(values, grid, method)
    assert bool((scale > 0).all())
    assert torch.equal(zero_point, zero_point.round())
    assert bool(((zero_point >= grid.quant_min) & (zero_point <= grid.quant_max)).all())
    assert not grid.symmetric or not zero_point.any()


@given(st.integers(0, 1000), st.sampled_from(GRIDS))
def test_mse_is_never_worse_than_minmax(seed: int, grid: QuantizationGrid) -> None:
    values = sample(2, seed).pow(3)
    errors = {
        method: rounding_error(values, *search_range(values, grid, method), grid)
        for method in ("minmax", "mse")
    }
    assert bool((errors["mse"] <= errors["minmax"]).all())


def test_mse_and_percentile_clip_an_outlier() -> None:
    values = sample(1)
    values[0, 0] = 1000.0
    grid = activation_grid(4)
    covering, _ = search_range(values, grid, "minmax")
    clipped, _ = search_range(values, grid, "percentile", percentile=99.0)
    assert clipped < 0.05 * covering
    assert search_range(values, grid, "mse")[0] < covering


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_rows_do_not_see_each_other(method: str) -> None:
    values = sample(4) * torch.tensor([[1.0], [10.0], [0.1], [3.0]])
    grid = activation_grid(4)
    together = torch.stack(search_range(values, grid, method))
    alone = [torch.stack(search_range(row[None], grid, method)) for row in values]
    assert torch.equal(together, torch.cat(alone, dim=1))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_range_scales_with_its_values(grid: QuantizationGrid) -> None:
    scale, zero_point = search_range(sample(), grid, "mse")
    larger, same_zero_point = search_range(sample() * 8, grid, "mse")
    assert torch.equal(larger, scale * 8)
    assert torch.equal(same_zero_point, zero_point)


def test_limits_widen_a_sample() -> None:
    limits = torch.tensor([[-3.0, 12.0]])
    scale, zero_point = search_range(torch.zeros(1, 5), activation_grid(4), "minmax", limits=limits)
    assert (scale.item(), zero_point.item()) == (1.0, 3.0)


@pytest.mark.parametrize("method", METHODS)
def test_a_given_zero_point_is_kept_and_covered(method: str) -> None:
    values, grid = sample(), activation_grid(8)
    zero_point = torch.tensor([0.0, 60.0, 255.0])
    scale = search_scale(values, zero_point, grid, method)
    assert scale.shape == (3,)
    if method == "minmax":
        low, high = (0 - zero_point) * scale, (255 - zero_point) * scale
        assert values[1].min() >= low[1] - 1e-4
        assert values[1].max() <= high[1] + 1e-4


@given(st.integers(0, 1000), st.sampled_from(["minmax", "mse"]), st.booleans())
def test_values_on_a_side_without_codes_do_not_count(seed: int, method: str, below: bool) -> None:
    values, grid = sample(2, seed).abs(), activation_grid(4)
    stray, zero_point = (-values, [0.0]) if below else (values, [15.0])
    expected = search_scale(-stray, torch.tensor(zero_point * 2), grid, method)
    strayed = torch.cat([-stray, stray], dim=1)
    assert torch.equal(search_scale(strayed, torch.tensor(zero_point * 2), grid, method), expected)


def test_a_row_that_has_no_code_gets_the_smallest_scale() -> None:
    scale = search_scale(-sample(1).abs(), torch.zeros(1), activation_grid(4))
    assert scale.item() == pytest.approx(SCALE_FLOOR)


def test_symmetric_search_scale_equals_search_range() -> None:
    values, grid = sample(), weight_grid(4)
    expected, zero_point = search_range(values, grid, "mse")
    error = rounding_error(values, search_scale(values, zero_point, grid), zero_point, grid)
    torch.testing.assert_close(error, rounding_error(values, expected, zero_point, grid))


def test_rounding_error_is_that_of_fake_quantize() -> None:
    values, grid = sample(2), activation_grid(4)
    scale, zero_point = torch.tensor([0.25, 0.5]), torch.tensor([4.0, 8.0])
    output = fake_quantize(values, scale, zero_point, 0, 15)
    expected = (output - values).square().mean(dim=1)
    assert torch.equal(rounding_error(values, scale, zero_point, grid), expected)


def test_unknown_method() -> None:
    with pytest.raises(ConfigError, match="'entropy' is not one of minmax, percentile, mse"):
        search_range(sample(), activation_grid(4), "entropy")
