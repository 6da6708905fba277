"""PACT's gradients in closed form, and NIPQ's noise in the place of rounding."""

import pytest
import torch
from torch import Tensor

from tdq_plugin.errors import ScaleError
from tdq_plugin.fake_quantize import fake_quantize
from tdq_plugin.grid import QuantizationGrid, activation_grid, weight_grid
from tdq_plugin.pseudo_quantize import pseudo_quantize
from tdq_plugin.quantizer import ActivationQuantizer, Estimator
from tdq_plugin.weights import WeightQuantizer

SIGNED = activation_grid(3, symmetric=True)


def leaves(seed: int = 1, zero: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, dtype=torch.float64, generator=generator)
    scale = torch.tensor(0.173, dtype=torch.float64, requires_grad=True)
    return x.requires_grad_(), scale, torch.tensor(zero, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("grid", [activation_grid(4), SIGNED])
@pytest.mark.parametrize("zero", [0.0, 2.0])
def test_gradients_of_pact_in_closed_form(grid: QuantizationGrid, zero: float) -> None:
    x, scale, zero_point = leaves(zero=zero)
    output = fake_quantize(x, scale, zero_point, grid.quant_min, grid.quant_max, "pact")
    found = torch.autograd.grad(output.sum(), (x, scale, zero_point))
    steps = x.detach() / 0.173
    above, below = steps > grid.quant_max - zero, steps < grid.quant_min - zero
    # Choi et al., eq. 3: the limit alpha = p * scale gets 1 for every value that it clips.
    of_limits = int(above.sum()) * (grid.quant_max - zero) + int(below.sum()) * (
        grid.quant_min - zero
    )
    assert above.any()
    assert below.any()
    assert torch.equal(found[0], (~above & ~below).double())
    assert found[1].item() == pytest.approx(of_limits, rel=1e-12)
    assert found[2].item() == pytest.approx(-0.173 * int((above | below).sum()), rel=1e-12)


def test_pact_and_lsq_round_alike() -> None:
    x, scale, zero_point = leaves()
    assert torch.equal(
        fake_quantize(x, scale, zero_point, 0, 15, "pact"),
        fake_quantize(x, scale, zero_point, 0, 15),
    )


def test_gradients_of_nipq_are_those_of_the_noise() -> None:
    x, scale, zero_point = leaves()
    torch.manual_seed(0)
    output = pseudo_quantize(x, scale, zero_point, 0, 15)
    found = torch.autograd.grad(output.sum(), (x, scale, zero_point))
    steps = x.detach() / 0.173
    above, below = steps >= 13, steps <= -2
    inside = ~above & ~below
    noise = ((output - x) / scale).detach()[inside]
    assert torch.equal(found[0], inside.double())
    expected = float(noise.sum()) + 13 * int(above.sum()) - 2 * int(below.sum())
    assert found[1].item() == pytest.approx(expected, rel=1e-9)
    assert found[2].item() == pytest.approx(-0.173 * int((above | below).sum()), rel=1e-12)


def test_noise_is_drawn_from_the_rounding_errors() -> None:
    x = torch.cat([torch.full((500,), 0.23), torch.full((500,), 0.1), torch.tensor([9.0, -9.0])])
    output = pseudo_quantize(x, torch.tensor(0.1), torch.tensor(3.0), 0, 15)
    added = ((output - x) / 0.1)[:1000]
    errors = torch.tensor([-0.3, 0.0])
    assert bool(((added[:, None] - errors).abs() < 1e-5).any(dim=1).all())
    assert added.unique().numel() >= 2
    assert float((added < -0.1).float().mean()) == pytest.approx(0.5, abs=0.1)
    assert output[1000:].tolist() == pytest.approx([1.2, -0.3])


def test_noise_per_sample_has_the_size_of_its_step() -> None:
    x = torch.rand(3, 4000, generator=torch.Generator().manual_seed(0)) - 0.5
    scale = torch.tensor([0.01, 0.1, 1e-6])
    output = pseudo_quantize(x, scale, torch.full((3,), 128.0), 0, 255)
    assert output[:2].sub(x[:2]).abs().amax(dim=1).tolist() == pytest.approx(
        [0.005, 0.05], rel=0.02
    )
    assert bool((output[2].abs() <= 128e-6).all())


def test_everything_clipped() -> None:
    output = pseudo_quantize(torch.full((4,), 9.0), torch.tensor(0.1), torch.tensor(0.0), 0, 15)
    assert output.tolist() == pytest.approx([1.5] * 4)


def test_wrong_number_of_scales() -> None:
    with pytest.raises(ScaleError, match="4 scales cannot be spread over a leading dimension of 6"):
        pseudo_quantize(torch.ones(6, 2), torch.ones(4), torch.ones(4), 0, 15)


@pytest.mark.parametrize("estimator", ["lsq", "pact", "nipq"])
def test_every_estimator_rounds_in_evaluation(estimator: Estimator) -> None:
    quantizer = ActivationQuantizer(activation_grid(4))
    quantizer.estimator = estimator
    x, scale, zero_point = (value.detach().float() for value in leaves())
    rounded = fake_quantize(x, scale, zero_point, 0, 15)
    assert torch.equal(quantizer.eval()(x, scale, zero_point), rounded)
    trained = quantizer.train()(x.requires_grad_(), scale, zero_point)
    assert torch.equal(trained, rounded) == (estimator != "nipq")


def test_weights_with_noise_in_training() -> None:
    quantizer = WeightQuantizer(weight_grid(4))
    weight = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    quantizer.initialise(weight)
    rounded = quantizer(weight)
    quantizer.noise_in_training = True
    noisy = quantizer.train()(weight)
    assert not torch.equal(noisy, rounded)
    noisy.square().sum().backward()
    assert quantizer.log_ratio.grad is not None
    assert torch.equal(quantizer.eval()(weight), rounded)
