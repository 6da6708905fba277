"""Which of NNCF's quantizers remain after prepare, with which bits and names."""

import copy
import re

import nncf
import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from diffusers import DiTTransformer2DModel
from diffusers_models import tiny_unet
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import QuantizationParameters
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import BaseQuantizer
from torch import nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import (
    TIMESTEP_PATTERNS,
    TDQQuantizer,
    prepare,
    strip,
    tdq_quantize_settings,
)
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.errors import AdapterError, ConfigError, TimestepError

FIRST_LAYER = nncf.OverflowFix.FIRST_LAYER


def bits_of(model):
    bank = tdq.scale_bank(model)
    return {name: grid.bits for name, grid in zip(bank.names, bank.grids, strict=True)}


def weight_bits(model):
    storage = get_hook_storage(model)
    hooks = dict(storage.named_hooks(remove_duplicate=False))
    return [hook.num_bits for hook in hooks.values() if isinstance(hook, BaseQuantizer)]


def quantize(model, batches, **overrides):
    return nncf.quantize(model, nncf.Dataset(batches), **(tdq_quantize_settings() | overrides))


def advanced(overflow_fix=nncf.OverflowFix.DISABLE, weights=None):
    return nncf.AdvancedQuantizationParameters(
        disable_bias_correction=True,
        overflow_fix=overflow_fix,
        weights_quantization_params=weights,
    )


@pytest.fixture(scope="module")
def unet():
    """A real UNet of diffusers, which returns no tensor; with attention and an interpolation."""
    return tiny_unet().eval()


@pytest.fixture(scope="module")
def unet_batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(2, 1, 8, 8, generator=generator), torch.tensor([t, 999])) for t in (5, 80)]


@pytest.fixture(scope="module")
def quantized_unet(unet, unet_batches):
    return quantize(unet, unet_batches)


def test_layers_names_and_bits_are_those_of_a_graph(unet, quantized_unet, unet_batches):
    example = unet_batches[0]
    model = tdq.attach(prepare(copy.deepcopy(quantized_unet), example, 4, 3))
    graph = tdq.trace(copy.deepcopy(unet), example).train()
    mapping = tdq_qconfig_mapping(graph, 4, 3)
    backend = tdq_backend_config()
    graph = tdq.attach(prepare_qat_fx(graph, mapping, example, backend_config=backend))
    layers = {name: n for name, n in bits_of(graph).items() if not name.startswith("product")}
    assert len(layers) == 33
    assert bits_of(model) == layers
    assert {grid.symmetric for grid in model.scale_bank.grids} == {False}
    assert sorted(weight_bits(model)) == [3] * 39 + [8] * 2


def test_products_are_quantized_if_wanted(unet, unet_batches):
    settings = tdq_quantize_settings(attention=True, symmetric_activations=True)
    model = tdq.attach(prepare(quantize(unet, unet_batches, **settings), unet_batches[0]))
    products = [name for name in bits_of(model) if name.startswith("product")]
    assert products == [f"product.{index}.{operand}" for index in range(4) for operand in (0, 1)]
    assert len(bits_of(model)) == 33 + 8
    assert {grid.symmetric for grid in model.scale_bank.grids} == {True}


def test_a_unet_at_8_bits_is_near_the_float_one(unet, quantized_unet, unet_batches):
    model = tdq.attach(prepare(copy.deepcopy(quantized_unet), unet_batches[0]))
    tdq.calibrate(model, unet_batches)
    with torch.no_grad():
        for batch in unet_batches:
            ours, theirs = model(*batch).sample, unet(*batch).sample
            assert 0 < (ours - theirs).norm() < 0.05 * theirs.norm()


def test_only_operands_keep_a_quantizer(quantized):
    model = quantized()
    assert "post_hooks.conv_out/conv2d/0__0.0" in dict(get_hook_storage(model).named_hooks())
    prepare(model, example_inputs())
    hooks = dict(get_hook_storage(model).named_hooks())
    assert "post_hooks.conv_out/conv2d/0__0.0" not in hooks
    assert [h.name for h in hooks.values() if isinstance(h, TDQQuantizer)] == [
        "conv_in.input",
        "conv_down.input",
        "to_query.input",
        "product.0.0",
        "conv_1d.input",
        "conv_out.input",
    ]


class Repeated(nn.Module):
    """A layer that is called twice, and a concatenation, whose parts share a scale."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(8, 1, 1)

    def forward(self, sample, timestep):
        hidden = self.first(sample).tanh() * timestep.reshape(-1, 1, 1, 1).cos()
        other = self.twice(self.twice(hidden.relu()).relu())
        return self.last(torch.cat([hidden.tanh(), other.tanh()], dim=1))


def test_calls_and_shared_quantizers():
    settings = {"ignored_scope": nncf.IgnoredScope(types=["cos", "mul"], validate=False)}
    model = prepare(quantize(Repeated().eval(), BATCHES, **settings), example_inputs(), 4, 4)
    hooks = list(get_hook_storage(model).named_hooks(remove_duplicate=False))
    shared = [name for name, hook in hooks if getattr(hook, "name", None) == "last.input"]
    assert len(shared) == 2
    tdq.attach(model)
    assert bits_of(model) == {
        "first.input": 8,
        "twice.input": 4,
        "twice.input.1": 4,
        "last.input": 8,
    }
    assert model(*BATCHES[0]).isfinite().all()


def test_timestep_that_nncf_quantized():
    model = nncf.quantize(TinyDenoiser().eval(), nncf.Dataset(BATCHES))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    message = r"timestep's own path \(the operation 'time_embedding/linear/0'\).*_settings\(\)\)"
    with pytest.raises(AdapterError, match=message):
        tdq.attach(model)
    message = r"own path: 'time_embedding/linear/0' depends on 'timestep' and not on 'sample'"
    with pytest.raises(AdapterError, match=message):
        prepare(model, example_inputs())
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


class Plain(nn.Module):
    """A model that has no module of a usual name on the timestep's path."""

    def __init__(self):
        super().__init__()
        self.first, self.layer = nn.Linear(1, 64), nn.Conv2d(1, 64, 3)

    def forward(self, sample, t):
        return self.layer(sample) + self.first(t.reshape(-1, 1)).tanh()[:, :, None, None]


def test_attach_names_the_timestep_or_what_is_missing(quantized):
    model = nncf.quantize(Plain().eval(), nncf.Dataset([(x, t.float()) for x, t in BATCHES]))
    with pytest.raises(AdapterError, match=r"timestep's own path \(the operation 't'\)"):
        tdq.attach(model)
    with pytest.raises(AdapterError, match=r"nncf\.prepare\(model, example_inputs\) before attach"):
        tdq.attach(quantized())


class OtherNames(nn.Module):
    """Blocks whose layers on the timestep's path no list knows."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Plain() for _ in range(2))
        self.last = nn.Conv2d(64, 1, 1)

    def forward(self, sample, timestep):
        return self.last(sum(block(sample, timestep.float()) for block in self.blocks))


def test_the_patterns_that_are_missing_are_named():
    model = quantize(OtherNames().eval(), BATCHES)
    with pytest.raises(AdapterError, match="'first/linear/0' depends on 'times") as caught:
        prepare(model, example_inputs())
    missing = re.findall(r'r"(.*?)"', str(caught.value))
    # One for both blocks: NNCF's names do not know the items of a ModuleList.
    assert missing == [r"first/linear/\d+"]
    settings = tdq_quantize_settings(timestep_patterns=[*TIMESTEP_PATTERNS, *missing])
    model = prepare(quantize(OtherNames().eval(), BATCHES, **settings), example_inputs())
    assert {name.rpartition(".")[0] for name in bits_of(tdq.attach(model))} == {
        "blocks.0.layer",
        "last",
    }


def test_a_transformer_of_diffusers():
    """Its timestep goes through modules of other names than a UNet's."""
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=2,
        num_layers=1,
        sample_size=4,
        num_embeds_ada_norm=10,
    ).eval()
    example = {
        "hidden_states": torch.randn(2, 2, 4, 4),
        "timestep": torch.tensor([5, 900]),
        "class_labels": torch.tensor([1, 2]),
    }
    model = tdq.attach(prepare(quantize(model, [example]), example))
    assert list(bits_of(model)) == [
        "pos_embed.proj.input",
        "transformer_blocks.0.attn1.to_q.input",
        "transformer_blocks.0.attn1.to_out.0.input",
        "transformer_blocks.0.ff.net.0.proj.input",
        "transformer_blocks.0.ff.net.2.input",
        "proj_out_2.input",
    ]


def test_a_model_that_is_prepared_already(quantized):
    model = prepare(quantized(), example_inputs())
    message = "TinyDenoiser is prepared already.*nncf.quantize on the float model again"
    with pytest.raises(AdapterError, match=message):
        prepare(model, example_inputs(), activation_bits=4)
    with pytest.raises(AdapterError, match=message):
        prepare(tdq.attach(model), example_inputs(), activation_bits=4)


def test_timestep_patterns():
    settings = tdq_quantize_settings(ignored_patterns=["conv_down.*"])
    model = quantize(TinyDenoiser().eval(), BATCHES, **settings)
    assert "conv_down.input" not in bits_of(tdq.attach(prepare(model, example_inputs())))


def test_quantizers_that_tdq_cannot_use():
    model = quantize(TinyDenoiser().eval(), BATCHES, advanced_parameters=advanced(FIRST_LAYER))
    with pytest.raises(AdapterError, match=r"50% of the range.*OverflowFix\.DISABLE"):
        prepare(model, example_inputs())
    asymmetric = advanced(weights=ASYMMETRIC)
    model = quantize(TinyDenoiser().eval(), BATCHES, advanced_parameters=asymmetric)
    with pytest.raises(AdapterError, match="AsymmetricQuantizer; only symmetric ones have 4 bits"):
        prepare(model, example_inputs(), weight_bits=4)


def test_models_and_examples_that_do_not_fit(quantized):
    with pytest.raises(AdapterError, match="TinyDenoiser has no quantizers of NNCF"):
        prepare(TinyDenoiser(), example_inputs())
    with pytest.raises(TimestepError, match=r"for \['sample'\], but none for the timestep"):
        prepare(quantized(), (example_inputs()[0], 5))
    with pytest.raises(AdapterError, match=r"no call of this TinyDenoiser: missing.*'timestep'"):
        prepare(quantized(), example_inputs()[:1])
    with pytest.raises(TimestepError, match="timestep_argument="):
        prepare(quantized(), example_inputs(), timestep_argument="sigma")
    with pytest.raises(ConfigError, match="9 bits are not supported"):
        prepare(quantized(), example_inputs(), activation_bits=9)
    with pytest.raises(ConfigError, match="0 bits are not supported"):
        prepare(quantized(), example_inputs(), first_last_bits=0)


@pytest.mark.parametrize("first_last_bits", [None, 8])
def test_first_and_last_layer(quantized, first_last_bits):
    model = prepare(quantized(), example_inputs(), 4, 3, first_last_bits=first_last_bits)
    outer = first_last_bits or 4
    assert list(bits_of(tdq.attach(model)).values()) == [outer, 4, 4, 4, 4, outer]
    assert weight_bits(model) == [first_last_bits or 3, 3, 3, 3, 3, first_last_bits or 3]


def test_layers_that_stay_float(quantized):
    everything = prepare(quantized(), example_inputs())
    model = prepare(quantized(), example_inputs(), float_layers=["conv_down", "conv_1*"])
    assert len(weight_bits(everything)) - len(weight_bits(model)) == 2
    left = bits_of(tdq.attach(everything)).keys() - bits_of(tdq.attach(model)).keys()
    assert left == {"conv_down.input", "conv_1d.input"}
    model.eval()(*example_inputs())
    with pytest.raises(ConfigError, match=r"'conv_up' matches none of the model's 6 layers"):
        prepare(quantized(), example_inputs(), float_layers=["conv_up"])


def test_an_input_that_other_layers_share_stays_quantized(quantized):
    model = prepare(quantized(), example_inputs(), float_layers=["to_query"])
    names = bits_of(tdq.attach(model))
    assert "to_query.input" not in names
    assert any(name.startswith("to_token.input") for name in names)


class Blurred(nn.Module):
    """A convolution whose kernel is a buffer, which is not trained."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 1)
        self.register_buffer("blur", torch.rand(4, 1, 3, 3) / 9)

    def forward(self, sample, timestep):
        hidden = self.first(sample).tanh() * (1 + timestep.reshape(-1, 1, 1, 1).cos())
        return self.last(nn.functional.conv2d(hidden, self.blur, padding=1, groups=4))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_kernel_that_is_a_buffer(bits):
    settings = {"ignored_scope": nncf.IgnoredScope(types=["cos", "add", "mul"], validate=False)}
    quantized = quantize(Blurred().eval(), BATCHES, **settings)
    left = prepare(copy.deepcopy(quantized), example_inputs(), float_layers=["blur"])
    assert bits_of(tdq.attach(left)) == {"first.input": 8, "last.input": 8}
    model = tdq.attach(prepare(quantized, example_inputs(), bits, bits))
    assert bits_of(model) == {"first.input": 8, "blur.input": bits, "last.input": 8}
    assert weight_bits(model) == [8, bits, 8]
    tdq.calibrate(model, BATCHES)
    stripped = strip(tdq.freeze(model, STEPS))
    with torch.no_grad():
        torch.testing.assert_close(stripped(*BATCHES[2]), model(*BATCHES[2]))


class Depthwise(nn.Module):
    """A convolution that NNCF may give a scale for each channel of its input."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 1)
        self.depthwise = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, sample, timestep):
        return self.depthwise(self.first(sample).tanh()) + timestep.reshape(-1, 1, 1, 1)


def test_activations_with_a_scale_for_each_channel():
    model = quantize(Depthwise().eval(), BATCHES, advanced_parameters=advanced())
    with pytest.raises(AdapterError, match=r"scale for each channel.*per_channel=False"):
        prepare(model, example_inputs())
    model = tdq.attach(prepare(quantize(Depthwise().eval(), BATCHES), example_inputs()))
    assert set(bits_of(model)) == {"first.input", "depthwise.input"}


def test_layer_of_zeros():
    model = TinyDenoiser().eval()
    nn.init.zeros_(model.conv_out.weight)
    model = tdq.attach(prepare(quantize(model, BATCHES), example_inputs(), weight_bits=4))
    assert model(*BATCHES[0]).isfinite().all()


ONE_SCALE = QuantizationParameters(per_channel=False)
ASYMMETRIC = QuantizationParameters(mode=QuantizationScheme.ASYMMETRIC)


@pytest.mark.parametrize(("weights", "bits"), [(ONE_SCALE, 8), (ONE_SCALE, 4), (ASYMMETRIC, 8)])
def test_weights_as_the_user_wants_them(weights, bits):
    parameters = advanced(weights=weights)
    model = quantize(TinyDenoiser().eval(), BATCHES, advanced_parameters=parameters)
    model = tdq.attach(prepare(model, example_inputs(), weight_bits=bits), tdq.ConstantBank)
    tdq.freeze(model, STEPS)
    stripped = strip(model)
    with torch.no_grad():
        pairs = [(stripped(*batch), model(*batch)) for batch in BATCHES]
    errors = sorted((ours - theirs).norm() / theirs.norm() for ours, theirs in pairs)
    assert errors[-2] < 1e-6
    # On some CPUs float rounding moves one activation to the next code.
    assert errors[-1] < 1e-3


def test_few_bits_search_the_range_of_a_weight(quantized):
    """The largest weight would leave most of few codes unused."""
    model, plain = prepare(quantized(), example_inputs(), weight_bits=4), quantized()
    name, port = "pre_hooks.conv_down/conv2d/0", "1.0"
    weight = model.conv_down.weight.detach()
    errors = []
    for chosen in (model, plain):
        hook = dict(get_hook_storage(chosen).named_hooks())[f"{name}__{port}"]
        hook.num_bits = 4
        errors.append((hook(weight) - weight).square().mean())
    assert errors[0] < 0.95 * errors[1]
