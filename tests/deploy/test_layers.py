"""Each integer layer against float64."""

import copy

import pytest
import torch
from torch import nn

from tdq_plugin import weight_grid
from tdq_plugin.deploy import layers
from tdq_plugin.deploy.activations import Codes
from tdq_plugin.deploy.weights import int8_layer
from tdq_plugin.weights import WeightQuantizer

LAYERS = {
    "conv2d": (lambda: nn.Conv2d(6, 10, 3, stride=(2, 1), padding=(1, 2), dilation=(1, 2)), (9, 9)),
    "grouped": (lambda: nn.Conv2d(6, 12, 3, padding=1, groups=3, bias=False), (9, 9)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 5, padding=2, groups=6), (9, 9)),
    "conv1d": (lambda: nn.Conv1d(6, 10, 3, padding=1), (9,)),
}
LINEAR = {"linear": (lambda: nn.Linear(6, 10), ()), "no bias": (lambda: nn.Linear(6, 3, False), ())}
CASES = LAYERS | LINEAR


def layer_and_input(name):
    torch.manual_seed(0)
    make, size = CASES[name]
    layer = make()
    layer.weight_fake_quant = WeightQuantizer(weight_grid(8))
    layer.weight_fake_quant.initialise(layer.weight)
    shape = (4, 5, 6) if name in LINEAR else (4, 6, *size)
    return layer, torch.randint(0, 256, shape, dtype=torch.uint8)


def float64(layer, codes):
    """The layer in float64 on the dequantized activation and weight."""
    quantizer = layer.weight_fake_quant
    exact = copy.deepcopy(layer).double()
    shape = (-1, *[1] * (layer.weight.dim() - 1))
    scale = quantizer.positive_scale().detach().double().reshape(shape)
    exact.weight = nn.Parameter(quantizer.codes(layer.weight).double() * scale)
    shape = (-1, *[1] * (codes.values.dim() - 1))
    x = (codes.values.double() - codes.zero_point.reshape(shape)) * codes.scale.reshape(shape)
    return exact(x.double()).detach()


def relative_error(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("zero_point", [0, 5, 128, 255])
def test_layer_equals_float64_also_at_its_padding(name, zero_point):
    layer, values = layer_and_input(name)
    codes = Codes(values, torch.tensor(0.0371), torch.tensor(zero_point, dtype=torch.int32))
    assert relative_error(int8_layer(layer)(codes), float64(layer, codes)) < 1e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("zero_point", [3, [0, 7, 128, 255]])
def test_weights_in_halves_where_sums_have_16_bits(name, zero_point, monkeypatch):
    monkeypatch.setattr(layers, "has_32_bit_sums", lambda: False)
    layer, values = layer_and_input(name)
    zero_point = torch.tensor(zero_point, dtype=torch.int32)
    scale = torch.full(zero_point.shape, 0.0371)
    ours, codes = int8_layer(layer), Codes(values, scale, zero_point)
    assert relative_error(ours(codes), float64(layer, codes)) < 1e-6
    assert ours.packed_weight.in_halves
    few_bits = int8_layer(layer)
    few_bits.largest_code = 15
    assert not few_bits.packed_weight.in_halves


def test_the_largest_weights_and_activations():
    layer = nn.Conv2d(16, 4, 3, bias=False)
    layer.weight_fake_quant = WeightQuantizer(weight_grid(8))
    layer.weight.data = torch.where(torch.rand_like(layer.weight) < 0.5, -1.0, 1.0)
    layer.weight_fake_quant.initialise(layer.weight, "minmax")
    values = torch.full((2, 16, 5, 5), 255, dtype=torch.uint8)
    codes = Codes(values, torch.tensor(1.0), torch.tensor(0, dtype=torch.int32))
    assert relative_error(int8_layer(layer)(codes), float64(layer, codes)) < 1e-6


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("zero_point", [[7], [0, 7, 128, 255]])
def test_one_scale_per_sample(name, zero_point):
    layer, values = layer_and_input(name)
    zero = torch.tensor(zero_point, dtype=torch.int32).squeeze()
    codes = Codes(values, torch.tensor([0.01, 0.5, 0.0371, 7.0]), zero)
    assert relative_error(int8_layer(layer)(codes), float64(layer, codes)) < 1e-6
    wrong = codes._replace(scale=codes.scale.flip(0))
    assert relative_error(int8_layer(layer)(wrong), float64(layer, codes)) > 0.1


def test_scales_spread_over_heads_that_lie_batch_major():
    layer, values = layer_and_input("linear")
    codes = Codes(values, torch.tensor([0.01, 0.5]), torch.tensor(128, dtype=torch.int32))
    spread = codes._replace(scale=codes.scale.repeat_interleave(2))
    assert torch.equal(int8_layer(layer)(codes), int8_layer(layer)(spread))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_codes_and_scales_are_the_quantizers(bits):
    layer = nn.Linear(6, 10)
    layer.weight_fake_quant = WeightQuantizer(weight_grid(bits))
    layer.weight_fake_quant.initialise(layer.weight)
    lowered = int8_layer(layer)
    ours = lowered.codes * lowered.weight_scale[:, None]
    assert torch.equal(ours, layer.weight_fake_quant(layer.weight).detach())


def test_loading_a_state_dict_packs_again_and_copies_share_nothing():
    first, values = layer_and_input("conv2d")
    codes = Codes(values, torch.tensor(0.0371), torch.tensor(9, dtype=torch.int32))
    source = int8_layer(first)
    second = copy.deepcopy(first)
    nn.init.normal_(second.weight)
    target = int8_layer(second)
    before = target(codes)
    clone = copy.deepcopy(target)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(codes), source(codes))
    assert torch.equal(clone(codes), before)
    assert not torch.equal(before, source(codes))
