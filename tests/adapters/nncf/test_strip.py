"""Stripped models: torch's operators only, the same values, ready for export."""

import warnings

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.quantization.layers import BaseQuantizer

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import StrippedModel, TDQQuantizer, strip
from tdq_plugin.adapters.nncf.plain import FakeQuantizeWeight, RescaledFakeQuantize
from tdq_plugin.adapters.torch_ao import quantize_eager
from tdq_plugin.errors import AdapterError, LookupRuleError, TimestepError

SAMPLE = BATCHES[2][0][:4]


@pytest.mark.parametrize("bits", [8, 4])
def test_stripped_model_gives_the_same_values(frozen, bits):
    model = frozen(bits, bits)
    stripped = strip(model)
    assert isinstance(stripped, StrippedModel)
    assert not [m for m in stripped.modules() if isinstance(m, TDQQuantizer | BaseQuantizer)]
    with torch.no_grad():
        for step in STEPS:
            torch.testing.assert_close(stripped(SAMPLE, step), model(SAMPLE, step))
        wrong = stripped(SAMPLE, 0) - model(SAMPLE, 999)
    assert wrong.abs().max() > 1e-3


def test_every_quantizer_alone(frozen):
    """At most one code, on at most 1e-5 of the values; a wrong ratio would miss most of them."""
    model = frozen()
    stripped = strip(model)
    plain = {m.name: m for m in stripped.modules() if isinstance(m, RescaledFakeQuantize)}
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    different, row = 0, torch.tensor([3])
    scales, zero_points = model.scale_bank.select(row)
    stripped._now.now = stripped.ratios[3], stripped.reciprocals[3]
    for index, (name, quantizer) in enumerate(tdq.named_quantizers(model)):
        scale = scales[index]
        with torch.no_grad():
            theirs = quantizer.forward(x * 20 * scale, scale, zero_points[index])
            ours = plain[name](x * 20 * scale)
        codes = (ours - theirs) / scale
        assert codes.abs().max() < 1.01
        different += int((codes.abs() > 0.5).sum())
    assert different <= 1e-5 * len(x) * len(plain)


def test_weights_are_those_of_nncf(frozen):
    model = frozen(8, 4)
    stripped = strip(model)
    native = dict(get_hook_storage(model).named_hooks())
    ours = dict(get_hook_storage(stripped.model).named_hooks())
    weights = {name: h for name, h in ours.items() if isinstance(h, FakeQuantizeWeight)}
    assert len(weights) == 6
    for name, hook in weights.items():
        weight = stripped.model.get_submodule(name.split(".")[1].split("/")[0]).weight.detach()
        torch.testing.assert_close(hook(weight), native[name](weight), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("timestep", [250, 250.0, torch.tensor(250), torch.tensor([250, 250.0])])
def test_forms_of_the_timestep(frozen, timestep):
    stripped = strip(frozen())
    with torch.no_grad():
        expected = stripped(SAMPLE[:2], torch.tensor([250]))
        assert torch.equal(stripped(SAMPLE[:2], timestep), expected)
        assert torch.equal(stripped(sample=SAMPLE[:2], timestep=timestep), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_traced_graph_serves_all_timesteps_and_batches(frozen, bits):
    stripped = strip(frozen(bits, bits))
    with warnings.catch_warnings(), torch.no_grad():
        # torch deprecates its tracer, which OpenVINO uses, and mentions constants of the model.
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(stripped, (SAMPLE, torch.tensor([100])))
    with torch.no_grad():
        for step in STEPS:
            assert torch.equal(traced(SAMPLE, torch.tensor([step])), stripped(SAMPLE, step))
        assert torch.equal(traced(SAMPLE[:1], torch.tensor([600])), stripped(SAMPLE[:1], 600))


def test_the_nearest_row_is_taken_in_a_trace_as_in_a_table(make):
    stripped = strip(tdq.freeze(make(), STEPS, lookup="nearest"))
    with torch.no_grad():
        program = torch.export.export(stripped, (SAMPLE, torch.tensor([7.0])))
        for step in (1.0, 50.0, 51.0, 800.0):
            exported = program.module()(SAMPLE, torch.tensor([step]))
            assert torch.equal(exported, stripped(SAMPLE, step))


def test_scales_that_stand_still_are_constant(make):
    model = make()
    table = tdq.freeze(model, STEPS).scale_bank.table
    still = tdq.ScaleTable(
        table.grids, table.timesteps, table.scales[2:3].expand_as(table.scales), table.zero_points
    )
    tdq.load_scales(model, still)
    stripped = strip(model)
    plain = [m for m in stripped.modules() if isinstance(m, RescaledFakeQuantize)]
    assert {m.row for m in plain} == {None}
    assert [m.scale for m in plain] == still.scales[0].tolist()
    assert torch.equal(stripped.ratios, torch.ones_like(stripped.ratios))
    with torch.no_grad():
        for step in STEPS:
            torch.testing.assert_close(stripped(SAMPLE, step), model(SAMPLE, step))


def test_timesteps_that_do_not_fit(frozen):
    stripped = strip(frozen())
    with pytest.raises(LookupRuleError, match="Timestep 3 is not in the frozen table"):
        stripped(SAMPLE, 3)
    with pytest.raises(TimestepError, match=r"one timestep for each call, not \[0\.0, 100\.0"):
        stripped(SAMPLE[:2], torch.tensor([0, 100]))
    with pytest.raises(RuntimeError, match="channels"):
        stripped(torch.zeros(1, 3, 8, 8), 100)
    assert stripped._now.now is None


def test_the_model_itself_stays_as_it_was(frozen):
    model = frozen()
    with torch.no_grad():
        before = model(SAMPLE, 250)
        strip(model)(SAMPLE, 600)
        assert torch.equal(model(SAMPLE, 250), before)
    assert isinstance(tdq.scale_bank(model), tdq.FrozenBank)


def test_banks_that_cannot_be_stripped(make):
    with pytest.raises(AdapterError, match="a GeneratorBank, and a stripped model holds a table"):
        strip(make())
    with pytest.raises(AdapterError, match="lookup='linear'"):
        strip(tdq.freeze(make(), STEPS, lookup="linear"))
    model = tdq.freeze(make(), STEPS)
    table = model.scale_bank.table
    moving = table.zero_points + torch.arange(len(STEPS))[:, None] * ~model_is_symmetric(model)
    moved = tdq.ScaleTable(table.grids, table.timesteps, table.scales, moving.clamp(max=200))
    with pytest.raises(AdapterError, match="5 zero points for each quantizer"):
        strip(tdq.load_scales(model, moved))
    with pytest.raises(AdapterError, match="TinyDenoiser has no hooks of NNCF"):
        strip(tdq.attach(quantize_eager(TinyDenoiser())))


def model_is_symmetric(model):
    return torch.tensor([grid.symmetric for grid in model.scale_bank.grids])


@pytest.mark.parametrize("mode", ["off", "dynamic"])
def test_a_quantizer_that_does_not_look_its_scale_up(frozen, mode):
    model = frozen()
    name, quantizer = next(tdq.named_quantizers(model))
    quantizer.mode = mode
    with pytest.raises(AdapterError, match=rf"{name!r} is in mode '{mode}'.*Set its mode"):
        strip(model)
    quantizer.mode = "quantize"
    strip(model)


def test_a_weight_quantizer_that_is_switched_off(frozen):
    model = frozen()
    hooks = dict(get_hook_storage(model).named_hooks())
    name = next(name for name, hook in hooks.items() if isinstance(hook, BaseQuantizer))
    hooks[name].disable_quantization()
    with pytest.raises(AdapterError, match=rf"weight quantizer {name!r} is switched off.*enable_"):
        strip(model)
    hooks[name].enable_quantization()
    strip(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_is_not_float32(frozen, dtype):
    message = rf"'conv_in.weight' is {dtype}, and .* stripped model take float32.*model\.float\(\)"
    model = frozen().to(dtype)
    with pytest.raises(AdapterError, match=message):
        strip(model)
    strip(model.float())(SAMPLE, 250)
