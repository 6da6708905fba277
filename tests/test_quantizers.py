"""The activation and the weight quantizer, and their modes."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tdq_plugin.errors import AdapterError, CalibrationError, ConfigError
from tdq_plugin.fake_quantize import fake_quantize
from tdq_plugin.grid import activation_grid, weight_grid
from tdq_plugin.quantizer import ActivationQuantizer, dynamic_range
from tdq_plugin.ranges import search_range
from tdq_plugin.weights import WeightQuantizer, follow_loaded_weight

X = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
SCALE, ZERO_POINT = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([7.0, 8.0, 0.0, 15.0])
WEIGHT = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(1))


def test_quantizes_by_the_given_row() -> None:
    quantizer = ActivationQuantizer(activation_grid(4))
    expected = fake_quantize(X, SCALE, ZERO_POINT, 0, 15)
    assert torch.equal(quantizer(X, SCALE, ZERO_POINT), expected)


@pytest.mark.parametrize(
    ("attribute", "value", "options"),
    [("estimator", "PACT", "lsq, pact, nipq"), ("mode", "Off", "quantize, observe, off, dynamic")],
)
def test_words_that_mean_nothing_are_refused(attribute: str, value: str, options: str) -> None:
    quantizer = ActivationQuantizer(activation_grid(4))
    before = getattr(quantizer, attribute)
    with pytest.raises(ConfigError, match=f"^{attribute} = '{value}' is not one of {options}"):
        setattr(quantizer, attribute, value)
    assert getattr(quantizer, attribute) == before


def test_off_and_observe_pass_the_activation_through() -> None:
    quantizer = ActivationQuantizer(activation_grid(4))
    quantizer.mode = "off"
    assert quantizer(X) is X
    quantizer.mode = "observe"
    assert quantizer(X) is X
    assert torch.equal(quantizer.observed[0], X)
    assert len(quantizer.observed) == 1


def test_what_was_observed_does_not_follow_the_activation() -> None:
    quantizer = ActivationQuantizer(activation_grid(4))
    quantizer.mode = "observe"
    x = X.clone()
    quantizer(x).mul_(100)
    assert torch.equal(quantizer.observed[0], X)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dynamic_in_low_precision(dtype: torch.dtype) -> None:
    quantizer = ActivationQuantizer(activation_grid(8))
    quantizer.mode = "dynamic"
    x = (X * torch.tensor([1.0, 10.0, 0.0, 100.0]).reshape(4, 1, 1)).to(dtype)
    assert torch.equal(quantizer(x), quantizer(x.float()).to(dtype))


@pytest.mark.parametrize("symmetric", [False, True])
def test_dynamic_covers_each_sample_by_its_own_range(symmetric: bool) -> None:
    grid = activation_grid(8, symmetric)
    quantizer = ActivationQuantizer(grid)
    quantizer.mode = "dynamic"
    x = X * torch.tensor([1.0, 10.0, 0.01, 1000.0]).reshape(4, 1, 1)
    output = quantizer(x, SCALE, ZERO_POINT)
    alone = torch.cat([quantizer(sample) for sample in x.split(1)])
    assert torch.equal(output, alone)
    scale, zero_point = dynamic_range(x, grid)
    assert scale.shape == zero_point.shape == (4,)
    error = (output - x).abs().flatten(1).amax(dim=1)
    assert bool((error <= scale * 1.001).all())


def test_a_call_without_a_scale() -> None:
    with pytest.raises(AdapterError, match=r"called without a scale. Call tdq_plugin.attach"):
        ActivationQuantizer(activation_grid(4))(X)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_by_output_channel(bits: int) -> None:
    grid = weight_grid(bits)
    quantizer = WeightQuantizer(grid)
    quantizer.initialise(WEIGHT)
    scale, _ = search_range(WEIGHT.flatten(1), grid)
    assert torch.equal(quantizer.scale, scale)
    expected = torch.stack(
        [
            fake_quantize(channel, s, torch.tensor(0.0), grid.quant_min, grid.quant_max)
            for channel, s in zip(WEIGHT, scale, strict=True)
        ]
    )
    assert torch.equal(quantizer(WEIGHT), expected)
    codes = quantizer.codes(WEIGHT)
    assert codes.dtype == torch.int8
    assert torch.equal(codes * scale.reshape(-1, 1, 1, 1), expected)


def test_weight_and_scale_are_trained() -> None:
    quantizer, weight = WeightQuantizer(weight_grid(4)), WEIGHT.clone().requires_grad_()
    quantizer.initialise(weight)
    quantizer(weight).square().sum().backward()
    assert weight.grad is not None
    assert quantizer.log_ratio.grad is not None
    assert bool((quantizer.log_ratio.grad != 0).all())


def test_weight_quantizer_switched_off() -> None:
    quantizer = WeightQuantizer(weight_grid(4))
    quantizer.enabled = False
    assert quantizer(WEIGHT) is WEIGHT


def test_weight_scales_travel_in_the_state_dict() -> None:
    first, second = WeightQuantizer(weight_grid(4)), WeightQuantizer(weight_grid(4))
    first.initialise(WEIGHT)
    second.load_state_dict(first.state_dict())
    assert torch.equal(second(WEIGHT), first(WEIGHT))


@given(
    bits=st.integers(2, 8),
    seed=st.integers(0, 2**31),
    middles=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
    width=st.sampled_from([1e-6, 1.0, 1e4]),
)
def test_asymmetric_weights_cover_every_channel(
    bits: int, seed: int, middles: list[float], width: float
) -> None:
    """From channels of one sign to those around zero: every weight is at most half a step off."""
    grid = weight_grid(bits, symmetric=False)
    values = torch.rand(len(middles), 7, generator=torch.Generator().manual_seed(seed)) - 0.5
    weight = width * (values + torch.tensor(middles)[:, None])
    quantizer = WeightQuantizer(grid)
    quantizer.initialise(weight, "minmax")
    scale, zero_point = quantizer.scale.detach(), quantizer.zero_point
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    torch.testing.assert_close(scale, (high - low) / (2**bits - 1))
    assert bool(((quantizer(weight) - weight).abs() <= 0.501 * scale[:, None]).all())
    assert bool((quantizer(torch.zeros_like(weight)) == 0).all())
    codes = quantizer.codes(weight)
    assert torch.equal(zero_point, zero_point.round())
    assert codes.dtype == torch.int8
    assert grid.quant_min <= int(codes.min()) <= int(codes.max()) <= grid.quant_max
    levels = (codes - zero_point[:, None]) * scale[:, None]
    assert torch.equal(quantizer(weight), levels)


def test_zero_points_make_one_sided_channels_finer() -> None:
    weight = WEIGHT.abs()
    errors = {}
    for symmetric in (True, False):
        quantizer = WeightQuantizer(weight_grid(4, symmetric))
        quantizer.initialise(weight, "minmax")
        errors[symmetric] = float((quantizer(weight) - weight).detach().square().mean())
    assert errors[False] < 0.4 * errors[True]


def test_zero_points_travel_in_the_state_dict_and_older_files_have_none() -> None:
    first, second = (WeightQuantizer(weight_grid(4, symmetric=False)) for _ in range(2))
    first.initialise(WEIGHT + 1)
    second.load_state_dict(first.state_dict())
    assert bool((second.zero_point != 0).all())
    assert torch.equal(second(WEIGHT), first(WEIGHT))
    symmetric = WeightQuantizer(weight_grid(4))
    symmetric.initialise(WEIGHT)
    older = {key: value for key, value in symmetric.state_dict().items() if key != "zero_point"}
    for restored in (WeightQuantizer(weight_grid(4)), second):
        restored.load_state_dict(older)
        assert torch.equal(restored(WEIGHT), symmetric(WEIGHT))
    assert "zero_point" not in older


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casting_a_model_leaves_the_scales_of_its_weights(dtype: torch.dtype) -> None:
    quantizer, weight = WeightQuantizer(weight_grid(8)), WEIGHT.clone()
    weight[0] = 0
    quantizer.initialise(weight)
    expected = quantizer(weight.to(dtype))
    assert torch.equal(quantizer.to(dtype)(weight.to(dtype)), expected)
    assert bool(expected.isfinite().all())


def test_a_weight_quantizer_without_scale() -> None:
    with pytest.raises(CalibrationError, match=r"no scale yet. Call tdq_plugin.attach"):
        WeightQuantizer(weight_grid(4))(WEIGHT)


class Layer(nn.Module):
    """A weight and its quantizer, as layers of the frameworks have them."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.clone())
        self.quantizer = WeightQuantizer(weight_grid(4))
        self.quantizer.initialise(self.weight, "minmax")
        follow_loaded_weight(self, "weight", "quantizer")


@pytest.mark.parametrize("copies", [0, 1])
def test_a_loaded_float_weight_renews_its_ranges(copies: int) -> None:
    model = nn.Sequential(Layer(WEIGHT))
    for _ in range(copies):
        model = copy.deepcopy(model)
    model.load_state_dict({"0.weight": 4 * WEIGHT}, strict=False)
    assert torch.equal(model[0].quantizer.scale, Layer(4 * WEIGHT).quantizer.scale)
    assert torch.equal(model[0].weight, 4 * WEIGHT)


def test_ranges_that_were_given_trained_or_restored_stay() -> None:
    given, trained, restored = (Layer(WEIGHT) for _ in range(3))
    given.quantizer.set_scale(torch.full((6,), 0.5))
    with torch.no_grad():
        trained.quantizer.log_ratio[1] = 0.1
    restored.load_state_dict(Layer(2 * WEIGHT).state_dict())
    assert torch.equal(restored.quantizer.scale, Layer(2 * WEIGHT).quantizer.scale)
    for layer in (given, trained, restored):
        scale = layer.quantizer.scale.detach().clone()
        layer.load_state_dict({"weight": 4 * WEIGHT}, strict=False)
        assert torch.equal(layer.quantizer.scale, scale)


def test_a_loaded_weight_of_another_shape_is_torch_s_error() -> None:
    layer = Layer(WEIGHT)
    scale = layer.quantizer.scale.detach().clone()
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        layer.load_state_dict({"weight": WEIGHT[:2]}, strict=False)
    assert torch.equal(layer.quantizer.scale, scale)
