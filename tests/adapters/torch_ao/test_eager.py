"""Models whose layers are exchanged, and the hooks that lead the scales to them."""

import copy
import functools

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser
from torch import nn
from torch.utils.checkpoint import checkpoint

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import TDQConv2d, TDQLinear, quantize_eager
from tdq_plugin.adapters.torch_ao.qconfig import _layers
from tdq_plugin.errors import AdapterError, ConfigError, TimestepError
from tdq_plugin.hooks import checkpoint_contexts

SAMPLE = BATCHES[2][0][:4]


@pytest.fixture
def model():
    torch.manual_seed(0)
    attached = tdq.attach(quantize_eager(TinyDenoiser().eval(), 4, 8))
    tdq.calibrate(attached, BATCHES)
    return attached


def test_layers_keep_their_identity_and_their_names():
    plain = TinyDenoiser().eval()
    layer, weight, names = plain.conv_in, plain.conv_in.weight, set(plain.state_dict())
    quantized = quantize_eager(plain)
    assert quantized is plain
    assert quantized.conv_in is layer
    assert type(layer) is TDQConv2d
    assert layer.weight is weight
    assert names < set(quantized.state_dict())
    assert type(quantized.to_query) is TDQLinear
    assert type(quantized.time_embedding) is nn.Linear


def test_the_timestep_s_layers_are_those_that_a_graph_finds(unet, unet_inputs):
    on_path, conditioning = _layers(tdq.trace(copy.deepcopy(unet), unet_inputs).graph)
    quantized = quantize_eager(copy.deepcopy(unet))
    exchanged = {n for n, m in quantized.named_modules() if isinstance(m, TDQConv2d | TDQLinear)}
    assert exchanged == set(on_path)
    assert len(conditioning) == 10


def test_names_and_bits_agree_with_a_graph(prepare, unet, unet_inputs):
    graph = tdq.attach(prepare(copy.deepcopy(unet), unet_inputs, 4, 8)).scale_bank
    eager = tdq.attach(quantize_eager(copy.deepcopy(unet), 4, 8)).scale_bank
    in_graph = dict(zip(graph.names, graph.grids, strict=True))
    in_eager = dict(zip(eager.names, eager.grids, strict=True))
    shared = in_graph.keys() & in_eager.keys()
    assert {name for name in in_graph if name not in shared} == {
        f"product.{attention}.{operand}" for attention in range(4) for operand in range(3)
    }
    assert all(name.endswith(("to_k.input", "to_v.input")) for name in in_eager.keys() - shared)
    assert all(in_graph[name] == in_eager[name] for name in shared)


def test_a_real_unet_at_8_bits_is_near_the_float_one(unet):
    model = tdq.attach(quantize_eager(copy.deepcopy(unet)))
    generator = torch.Generator().manual_seed(0)
    batches = [
        {"sample": torch.randn(4, 1, 8, 8, generator=generator), "timestep": step} for step in STEPS
    ]
    tdq.calibrate(model, batches)
    with torch.no_grad():
        for batch in batches:
            ours, theirs = model(**batch).sample, unet(**batch).sample
            assert 0 < (ours - theirs).norm() < 0.05 * theirs.norm()


def test_float_layers():
    quantized = quantize_eager(TinyDenoiser().eval(), float_layers=("conv_*",))
    assert type(quantized.conv_in) is nn.Conv2d
    assert type(quantized.to_query) is TDQLinear
    with pytest.raises(ConfigError, match="'convv' matches none of the model's 7 layers"):
        quantize_eager(TinyDenoiser(), float_layers=("convv",))


def test_weights_with_zero_points():
    layer = quantize_eager(TinyDenoiser().eval(), symmetric_weights=False).conv_in
    assert layer.weight_fake_quant.zero_point.any()
    assert layer.weight_fake_quant.qscheme == torch.per_channel_affine


def test_models_that_cannot_be_exchanged(prepare, unet_inputs):
    with pytest.raises(AdapterError, match="None of the 7 convolutions and linear layers"):
        quantize_eager(TinyDenoiser(), float_layers=("*",))
    graph = tdq.trace(TinyDenoiser().eval(), unet_inputs)
    with pytest.raises(AdapterError, match="is a graph"):
        quantize_eager(graph)


def test_a_layer_outside_of_a_call_raises(model):
    model(SAMPLE, 250)
    with pytest.raises(TimestepError, match="outside of a call of its model"):
        model.conv_in(SAMPLE)
    with pytest.raises(TimestepError, match="outside of a call of its model"):
        model.forward(SAMPLE, 250)


def test_no_scales_remain_after_a_call_that_failed(model):
    with pytest.raises(RuntimeError, match="to have 1 channels"):
        model(torch.zeros(1, 3, 8, 8), 250)
    with pytest.raises(TimestepError, match="outside of a call of its model"):
        model.conv_in(SAMPLE)


def test_a_copy_has_hooks_of_its_own(model):
    twin = copy.deepcopy(model)
    seen = []

    def run_original(*_):
        # In the middle of the copy's call, with another timestep.
        seen.append(model(SAMPLE, 600))

    twin.conv_in.register_forward_hook(run_original)
    with torch.no_grad():
        expected, inner = model(SAMPLE, 100), model(SAMPLE, 600)
        assert torch.equal(twin(SAMPLE, 100), expected)
    assert torch.equal(seen[0], inner)
    assert not torch.equal(inner, expected)


def test_the_timestep_s_argument_can_be_named():
    class Renamed(TinyDenoiser):
        def forward(self, sample, noise_level):
            return super().forward(sample, noise_level)

    model = quantize_eager(Renamed().eval())
    with pytest.raises(TimestepError, match="timestep_argument="):
        tdq.attach(model)
    model = tdq.attach(quantize_eager(Renamed().eval()), timestep_argument="noise_level")
    tdq.calibrate(model, BATCHES)
    assert model(SAMPLE, noise_level=5).isfinite().all()


def gradients(model):
    model.zero_grad()
    model(sample=SAMPLE, timestep=torch.tensor(STEPS[:4]))[0].square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def test_activation_checkpointing(unet):
    model = tdq.attach(quantize_eager(copy.deepcopy(unet))).train()
    tdq.calibrate(model, BATCHES)
    expected = gradients(model)
    contexts = functools.partial(checkpoint_contexts, model)
    run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    model.enable_gradient_checkpointing(run)
    assert all(torch.equal(g, expected[name]) for name, g in gradients(model).items())
    model.enable_gradient_checkpointing()
    with pytest.raises(TimestepError, match="checkpoint_contexts"):
        gradients(model)


def test_checkpoint_contexts_of_another_model(model):
    with pytest.raises(AdapterError, match="has no scale hooks"):
        checkpoint_contexts(nn.Linear(1, 1))
    with pytest.raises(TimestepError, match="outside of a call"):
        checkpoint_contexts(model)


@pytest.mark.parametrize(
    "bits", [{"activation_bits": 9}, {"weight_bits": 1}, {"first_last_bits": 0}]
)
def test_bits_that_there_are_not_leave_the_model_as_it_was(bits):
    model = TinyDenoiser().eval()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ConfigError, match=r"[901] bits are not supported"):
        quantize_eager(model, **bits)
    assert {name: type(module) for name, module in model.named_modules()} == before
