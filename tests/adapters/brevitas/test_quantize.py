"""Layer maps, the one call that uses them, and the configurations of `brevitas_examples`."""

import copy

import brevitas.nn as qnn
import pytest
import torch
from brevitas.graph.quantize import layerwise_quantize
from brevitas.quant import Int8WeightPerTensorFloat
from brevitas_examples.common.generative.quantize import generate_quant_maps, generate_quantizers
from contract.networks import BATCHES, STEPS, TinyDenoiser
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import (
    quantize_layerwise,
    register_with_brevitas_examples,
    tdq_layer_map,
    timestep_path_names,
)
from tdq_plugin.adapters.torch_ao import quantize_eager
from tdq_plugin.errors import AdapterError, ConfigError
from tdq_plugin.grid import activation_grid

SAMPLE, TIMESTEPS = BATCHES[2][0][:4], torch.tensor(STEPS[:4])
LAYERS = ("conv_in", "conv_down", "to_query", "to_token", "conv_1d", "conv_out")


class Attention(nn.Module):
    """All attention that a layer map knows."""

    def __init__(self, batch_first):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.up = nn.ConvTranspose2d(2, 4, 2, stride=2)
        self.products = qnn.ScaledDotProductAttention()

    def forward(self, tokens, timestep):
        first = tokens if self.attention.batch_first else tokens.transpose(0, 1)
        attended, _ = self.attention(first, first, first)
        attended = attended if self.attention.batch_first else attended.transpose(0, 1)
        heads = [x.unflatten(2, (2, 4)).transpose(1, 2) for x in (attended, tokens, tokens)]
        return self.up(self.products(*heads))


def test_names_bits_and_exceptions():
    model = tdq.attach(quantize_layerwise(TinyDenoiser().eval(), activation_bits=4, weight_bits=5))
    bank = tdq.scale_bank(model)
    assert bank.names == tuple(f"{layer}.input" for layer in LAYERS)
    assert [grid.bits for grid in bank.grids] == [8, 4, 4, 4, 4, 8]
    bits = [int(getattr(model, layer).weight_quant.bit_width()) for layer in LAYERS]
    assert bits == [8, 5, 5, 5, 5, 8]
    assert type(model.time_embedding) is nn.Linear


def test_names_and_codes_agree_with_the_other_road_without_a_graph():
    torch.manual_seed(0)
    unet = TinyDenoiser().eval()
    ours = tdq.attach(quantize_layerwise(copy.deepcopy(unet), activation_bits=4)).scale_bank
    theirs = tdq.attach(quantize_eager(copy.deepcopy(unet), activation_bits=4)).scale_bank
    assert ours.names == theirs.names
    assert ours.grids == theirs.grids


def test_float_layers():
    model = quantize_layerwise(TinyDenoiser(), first_last_bits=None, float_layers=("conv_*",))
    assert type(model.conv_in) is nn.Conv2d
    assert type(model.to_query) is qnn.QuantLinear
    with pytest.raises(ConfigError, match="'convv' matches none of the model's 7 layers"):
        quantize_layerwise(TinyDenoiser(), float_layers=("convv",))
    with pytest.raises(AdapterError, match=r"None of the 7 layers .* TinyDenoiser"):
        quantize_layerwise(TinyDenoiser(), float_layers=("*",))


def test_blacklist_for_brevitas_own_call():
    model = TinyDenoiser().eval()
    blacklist = timestep_path_names(model)
    assert blacklist == ["time_embedding"]
    assert timestep_path_names(model, ["to_*"]) == ["to_query", "to_token"]
    layerwise_quantize(model, tdq_layer_map(8, 4), name_blacklist=blacklist)
    bank = tdq.scale_bank(tdq.attach(model))
    assert bank.grids == (activation_grid(4),) * len(LAYERS)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_and_transposed_convolutions(symmetric, batch_first):
    torch.manual_seed(0)
    float_model = Attention(batch_first).eval()
    layer_map = tdq_layer_map(8, 8, symmetric)
    model = tdq.attach(layerwise_quantize(copy.deepcopy(float_model), layer_map)).eval()
    assert len(tdq.scale_bank(model).names) == 2 + 4 + 1 + 4
    tokens, timesteps = torch.randn(4, 4, 8), torch.tensor(STEPS[:4])
    tdq.calibrate(model, [(tokens, timesteps)], num_timesteps=1000)
    with torch.no_grad():
        expected = float_model(tokens, timesteps)
        assert 0 < (model(tokens, timesteps) - expected).norm() < 0.1 * expected.norm()


def test_weight_quantizers_of_choice():
    layer_map = tdq_layer_map(weight_quant=Int8WeightPerTensorFloat, weight_bits=3)
    layer, arguments = layer_map[nn.Conv2d]
    assert layer is qnn.QuantConv2d
    assert issubclass(arguments["weight_quant"], Int8WeightPerTensorFloat)
    assert arguments["weight_quant"].bit_width == 3
    assert arguments["bias_quant"] is None


@pytest.mark.parametrize("kind", ["sym", "asym"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 6)])
def test_configurations_of_brevitas_examples(kind, bits):
    register_with_brevitas_examples()
    weight_bits, input_bits = bits
    quantizers = generate_quantizers(
        weight_bit_width=weight_bits,
        weight_param_method="stats",
        weight_scale_precision="float_scale",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        weight_group_size=None,
        quantize_weight_zero_point=False,
        input_bit_width=input_bits,
        input_quant_format="int",
        input_scale_type="tdq",
        input_scale_precision="float_scale",
        input_param_method="stats",
        input_quant_type=kind,
        input_quant_granularity="per_tensor",
    )
    layer_map = generate_quant_maps(
        **quantizers, dtype=torch.float32, device="cpu", quantize_embedding=False
    )
    torch.manual_seed(0)
    model = layerwise_quantize(TinyDenoiser().eval(), layer_map, ["time_embedding"])
    bank = tdq.scale_bank(tdq.attach(model.eval()))
    # Their maps know no convolution of one dimension.
    assert bank.names == tuple(f"{layer}.input" for layer in LAYERS if layer != "conv_1d")
    assert set(bank.grids) == {activation_grid(input_bits, kind == "sym")}
    tdq.calibrate(model, BATCHES)
    mixed = model(SAMPLE, TIMESTEPS)
    single = [model(SAMPLE[i : i + 1], step) for i, step in enumerate(STEPS[:4])]
    torch.testing.assert_close(mixed, torch.cat(single), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{"activation_bits": 9}, {"weight_bits": 1}, {"first_last_bits": 0}]
)
def test_wrong_bits_leave_the_model_as_it_was(options):
    model = TinyDenoiser()
    with pytest.raises(ConfigError, match=f"{next(iter(options.values()))} bits are not supported"):
        quantize_layerwise(model, **options)
    assert type(model.conv_in) is nn.Conv2d
    assert type(model.conv_out) is nn.Conv2d


class Shared(nn.Module):
    """One layer under two names of one module, and of two."""

    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(2, 2), nn.Linear(2, 2)
        self.again, self.inner = self.middle, nn.Sequential(self.middle)
        self.last = nn.Linear(2, 2)

    def forward(self, sample, timestep):
        hidden = self.inner(self.again(self.middle(self.first(sample)).tanh()).tanh())
        return self.last(hidden.tanh())


def test_shared_layers_stay_shared():
    model = quantize_layerwise(Shared(), activation_bits=4)
    assert type(model.middle) is qnn.QuantLinear
    assert model.again is model.middle is model.inner[0]
    bank = tdq.scale_bank(tdq.attach(model))
    assert [grid.bits for grid in bank.grids] == [8, 4, 8]
    float_middle = quantize_layerwise(Shared(), float_layers=("middle",))
    assert type(float_middle.middle) is nn.Linear
    assert float_middle.again is float_middle.middle is float_middle.inner[0]
