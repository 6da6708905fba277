"""The laws of fake quantization, torch's own operator, and LSQ's gradients in closed form."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tdq_plugin.errors import ScaleError
from tdq_plugin.fake_quantize import (
    fake_quantize,
    gradient_scale,
    per_sample,
    quantize,
    round_straight_through,
)
from tdq_plugin.grid import QuantizationGrid, activation_grid

floats = st.floats(-100, 100, width=32)
values = st.lists(floats, min_size=1, max_size=64).map(torch.tensor)
steps = st.floats(2**-10, 8, width=32).map(torch.tensor)


@st.composite
def quantizers(draw) -> tuple[Tensor, Tensor, int, int]:
    """A scale, a zero point on the grid, and the grid's limits."""
    grid = activation_grid(draw(st.integers(2, 8)), symmetric=draw(st.booleans()))
    zero_point = 0 if grid.symmetric else draw(st.integers(grid.quant_min, grid.quant_max))
    return draw(steps), torch.tensor(float(zero_point)), grid.quant_min, grid.quant_max


@given(values, quantizers())
def test_bit_equal_to_torch(x: Tensor, quantizer: tuple) -> None:
    scale, zero_point, low, high = quantizer
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point.int(), low, high)
    assert torch.equal(fake_quantize(x, scale, zero_point, low, high), expected)


@given(values, quantizers())
def test_training_and_inference_give_the_same_bits(x: Tensor, quantizer: tuple) -> None:
    trained = fake_quantize(x.clone().requires_grad_(), *quantizer)
    assert trained.requires_grad
    assert torch.equal(trained, fake_quantize(x, *quantizer))


@given(values, quantizers())
def test_idempotent(x: Tensor, quantizer: tuple) -> None:
    once = fake_quantize(x, *quantizer)
    assert torch.equal(fake_quantize(once, *quantizer), once)


@given(values, quantizers())
def test_within_half_a_step_inside_the_range(x: Tensor, quantizer: tuple) -> None:
    scale, zero_point, low, high = quantizer
    inside = x.clamp((low - zero_point) * scale, (high - zero_point) * scale)
    error = (fake_quantize(inside, *quantizer) - inside).abs()
    assert bool((error <= 0.5 * scale + 1e-5 * inside.abs()).all())


@given(values, quantizers())
def test_monotone(x: Tensor, quantizer: tuple) -> None:
    assert bool((fake_quantize(x.sort().values, *quantizer).diff() >= 0).all())


@given(quantizers())
def test_no_more_levels_than_codes(quantizer: tuple) -> None:
    _, _, low, high = quantizer
    levels = fake_quantize(torch.linspace(-5000, 5000, 10007), *quantizer).unique()
    assert len(levels) <= high - low + 1


@given(quantizers())
def test_zero_stays_zero(quantizer: tuple) -> None:
    assert fake_quantize(torch.zeros(3), *quantizer).tolist() == [0, 0, 0]


@given(values, quantizers())
def test_codes_are_integers_of_the_grid(x: Tensor, quantizer: tuple) -> None:
    scale, zero_point, low, high = quantizer
    codes = quantize(x, *quantizer)
    assert torch.equal(codes, codes.round())
    assert bool(((codes >= low) & (codes <= high)).all())
    assert torch.equal((codes - zero_point) * scale, fake_quantize(x, *quantizer))


@pytest.mark.parametrize("repeats", [1, 4])
@pytest.mark.parametrize("learned", [True, False])
def test_per_sample_equals_one_by_one(repeats: int, learned: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3 * repeats, 5, 2, generator=generator).requires_grad_(learned)
    scale, zero_point = torch.tensor([0.1, 0.02, 0.5]), torch.tensor([3.0, 8.0, 0.0])
    together = fake_quantize(x, scale, zero_point, 0, 15)
    alone = [
        fake_quantize(group, s, z, 0, 15)
        for group, s, z in zip(x.split(repeats), scale, zero_point, strict=True)
    ]
    assert torch.equal(together, torch.cat(alone))


def test_one_scale_of_shape_one_serves_all() -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.1])
    expected = fake_quantize(x, scale[0], torch.tensor(0.0), -8, 7)
    assert torch.equal(fake_quantize(x, scale, torch.zeros(1), -8, 7), expected)


def closed_form(
    x: Tensor, scale: float, zero: float, low: int, high: int
) -> tuple[Tensor, float, float]:
    """LSQ's gradients of the sum of outputs, value by value (Esser et al., eq. 3; LSQ+, eq. 7)."""
    gradient_x, gradient_s, gradient_z = [], 0.0, 0.0
    for value in x.flatten().tolist():
        step = value / scale
        below, above = step < low - zero, step > high - zero
        gradient_x.append(0.0 if below or above else 1.0)
        if below or above:
            gradient_s += (low if below else high) - zero
            gradient_z -= scale
        else:
            gradient_s += round(step) - step
    factor = (x.numel() * high) ** -0.5
    return torch.tensor(gradient_x).double(), gradient_s * factor, gradient_z * factor


@pytest.mark.parametrize("grid", [activation_grid(4), activation_grid(3, symmetric=True)])
@pytest.mark.parametrize("zero", [0.0, 2.0])
def test_gradients_in_closed_form(grid: QuantizationGrid, zero: float) -> None:
    x = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, scale = x.requires_grad_(), torch.tensor(0.173, dtype=torch.float64, requires_grad=True)
    zero_point = torch.tensor(zero, dtype=torch.float64, requires_grad=True)
    output = fake_quantize(x, scale, zero_point, grid.quant_min, grid.quant_max)
    found = torch.autograd.grad(output.sum(), (x, scale, zero_point))
    expected = closed_form(x.detach(), 0.173, zero, grid.quant_min, grid.quant_max)
    assert torch.equal(found[0], expected[0])
    assert not expected[0].all()
    assert found[1].item() == pytest.approx(expected[1], rel=1e-12)
    assert found[2].item() == pytest.approx(expected[2], rel=1e-12)


def test_gradients_per_sample_equal_one_by_one() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(6, 7, dtype=torch.float64, generator=generator)
    upstream = torch.randn(6, 7, dtype=torch.float64, generator=generator)
    scale = torch.tensor([0.1, 0.3, 0.02], dtype=torch.float64)
    zero_point = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64)

    def gradients(rows: slice, samples: slice) -> list[Tensor]:
        leaves = [
            leaf.clone().requires_grad_() for leaf in (x[samples], scale[rows], zero_point[rows])
        ]
        output = fake_quantize(*leaves, 0, 15)
        return list(torch.autograd.grad(output, leaves, upstream[samples]))

    together = gradients(slice(0, 3), slice(0, 6))
    alone = [gradients(slice(i, i + 1), slice(2 * i, 2 * i + 2)) for i in range(3)]
    for index, gradient in enumerate(together):
        one_by_one = torch.cat([parts[index] for parts in alone])
        torch.testing.assert_close(gradient, one_by_one, rtol=1e-12, atol=1e-14)


def test_gradient_of_the_scale_is_that_of_straight_through_rounding() -> None:
    x = torch.tensor([0.31, 1.77, -9.0, 9.0], dtype=torch.float64)
    scale = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    zero = torch.tensor(7.0, dtype=torch.float64)

    def straight_through(s: Tensor) -> Tensor:
        steps = (x / s).clamp(0 - zero, 15 - zero)
        return (round_straight_through(steps) * s).sum()

    (found,) = torch.autograd.grad(fake_quantize(x, scale, zero, 0, 15).sum(), scale)
    (reference,) = torch.autograd.grad(straight_through(scale), scale)
    assert found.item() == pytest.approx(reference.item() * (4 * 15) ** -0.5, rel=1e-12)


def test_gradient_scale_is_that_of_the_paper() -> None:
    assert gradient_scale(torch.zeros(8, 100), torch.zeros(8, 1), 7) == (100 * 7) ** -0.5
    assert gradient_scale(torch.zeros(0), torch.zeros(()), 7) == 7**-0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("learned", [True, False])
def test_low_precision_in_and_out_with_a_float32_scale(dtype: torch.dtype, learned: bool) -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale = torch.full((4,), 0.11, requires_grad=learned)
    output = fake_quantize(x, scale, torch.full((4,), 7.0), 0, 15)
    exact = fake_quantize(x.float(), scale, torch.full((4,), 7.0), 0, 15)
    assert output.dtype == dtype
    assert torch.equal(output, exact.to(dtype))
    if learned:
        output.sum().backward()
        assert scale.grad is not None
        assert scale.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_with_one_scale_is_that_of_one_scale_per_sample(dtype: torch.dtype) -> None:
    x = torch.randn(8, 99, generator=torch.Generator().manual_seed(0)).to(dtype)
    scale, zero_point = torch.tensor(0.0371), torch.tensor(120.0)
    per_sample_rows = scale.expand(8), zero_point.expand(8)
    expected = fake_quantize(x, *per_sample_rows, 0, 255)
    assert torch.equal(fake_quantize(x, scale, zero_point, 0, 255), expected)
    trained = fake_quantize(x.clone().requires_grad_(), scale, zero_point, 0, 255)
    assert torch.equal(trained, expected)


def test_backward_within_autocast_gives_the_same_gradient() -> None:
    x = torch.randn(4, 999, generator=torch.Generator().manual_seed(0))
    scale = torch.full((4,), 0.037, requires_grad=True)

    def gradient(autocast: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            output = fake_quantize(x, scale, torch.zeros(4), -128, 127)
            return torch.autograd.grad(output.square().sum(), scale)[0]

    assert torch.equal(gradient(autocast=True), gradient(autocast=False))


def test_gradient_of_low_precision_x_has_its_dtype() -> None:
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    fake_quantize(x, torch.tensor(0.1), torch.tensor(0.0), -8, 7).sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_samples_that_do_not_lie_batch_major() -> None:
    with pytest.raises(ScaleError, match="4 scales cannot be spread over a leading dimension of 6"):
        per_sample(torch.ones(4), torch.ones(6, 2))
    with pytest.raises(ScaleError, match="4 scales cannot be spread over a leading dimension of 2"):
        per_sample(torch.ones(4), torch.ones(2, 6))
    with pytest.raises(ScaleError, match=r"shape \(\) or \(B,\), not \(2, 1\)"):
        per_sample(torch.ones(2, 1), torch.ones(2, 6))


def test_straight_through_rounding() -> None:
    x = torch.tensor([0.5, 1.5, -0.6], requires_grad=True)
    rounded = round_straight_through(x)
    rounded.sum().backward()
    assert rounded.tolist() == [0.0, 2.0, -1.0]
    assert x.grad.tolist() == [1.0, 1.0, 1.0]


def test_compiles_without_a_graph_break() -> None:
    compiled = torch.compile(fake_quantize, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    arguments = (torch.tensor([0.1, 0.2]), torch.tensor([3.0, 0.0]), 0, 15)
    assert torch.equal(compiled(x, *arguments), fake_quantize(x, *arguments))
