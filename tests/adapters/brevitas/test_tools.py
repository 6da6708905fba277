"""Brevitas' own tools on an attached model, with generators as with a table."""

import copy
from functools import partial

import pytest
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.graph.calibrate import bias_correction_mode, quantization_status_manager
from brevitas.graph.equalize import activation_equalization_mode
from brevitas.graph.gpfq import gpfq_mode
from brevitas.graph.gptq import gptq_mode
from brevitas.quant import Int8WeightPerChannelFloat
from contract.networks import BATCHES, STEPS, TinyDenoiser
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import TDQActQuantProxy, quantize_layerwise
from tdq_plugin.errors import AdapterError, CalibrationError

SAMPLE, TIMESTEPS = BATCHES[2][0][:4], torch.tensor(STEPS[:4])
W4 = {"activation_bits": 8, "weight_bits": 4, "first_last_bits": None}


@pytest.fixture(params=["live", "frozen"])
def model(request, calibrated):
    model = calibrated(**W4)
    return tdq.freeze(model, STEPS) if request.param == "frozen" else model


def float_output(timesteps=TIMESTEPS):
    torch.manual_seed(0)
    return TinyDenoiser().eval()(SAMPLE, timesteps).detach()


def error(model):
    with torch.no_grad():
        return float((model(SAMPLE, TIMESTEPS) - float_output()).norm() / float_output().norm())


def run_batches(model):
    for batch in BATCHES:
        model(*batch)


def correct_bias(model):
    with torch.no_grad(), bias_correction_mode(model):
        run_batches(model)


def equalization(model):
    return activation_equalization_mode(model, 0.5, layerwise=True, add_mul_node=True)


def layer_by_layer(mode, model, **options):
    with torch.no_grad(), mode(model, **options) as running:
        for _ in range(running.num_layers):
            run_batches(running.model)
            running.update()


@pytest.mark.parametrize(
    "tool",
    [
        correct_bias,
        partial(layer_by_layer, gptq_mode),
        partial(layer_by_layer, gptq_mode, act_order=True, use_quant_activations=False),
        partial(layer_by_layer, gpfq_mode),
    ],
    ids=["bias_correction", "gptq", "gptq_float_activations", "gpfq"],
)
@pytest.mark.parametrize("inside", ["plain", "quant_inference_mode"])
def test_tools_that_correct_weights(model, tool, inside):
    before = error(model)
    rows = [row.clone() for row in tdq.scale_bank(model)(TIMESTEPS)]
    with torch.no_grad(), quant_inference_mode(model, enabled=inside != "plain"):
        model(SAMPLE, 250)
        tool(model)
    assert error(model) < 0.6 * before
    for ours, theirs in zip(tdq.scale_bank(model)(TIMESTEPS), rows, strict=True):
        assert torch.equal(ours, theirs)


def test_activation_equalization_before_quantization():
    torch.manual_seed(0)
    model = TinyDenoiser().eval()
    with torch.no_grad(), equalization(model):
        run_batches(model)
    model = tdq.attach(quantize_layerwise(model, **W4)).eval()
    assert "conv_in.layer.input" in tdq.scale_bank(model).names
    tdq.calibrate(model, BATCHES)
    assert error(model) < 0.15


def test_activation_equalization_of_a_quantized_model(calibrated):
    # A weight scale that is a parameter would not follow the weights that are equalized.
    model = calibrated(weight_quant=Int8WeightPerChannelFloat, **W4)
    before = error(model)
    tdq.freeze(model, STEPS)
    with torch.no_grad(), equalization(model):
        run_batches(model)
    assert "EqualizedModule" in repr(model)
    assert error(model) < 2 * before


def test_learned_rounding_trains_with_the_generators(around):
    weights = Int8WeightPerChannelFloat.let(
        scaling_impl_type="parameter_from_stats",
        float_to_int_impl_type="learned_round",
        learned_round_impl_type="hard_sigmoid",
        learned_round_gamma=-0.1,
        learned_round_zeta=1.1,
        learned_round_init=torch.zeros(4, 8),
        bit_width=4,
    )
    model = tdq.attach(quantize_layerwise(around(nn.Linear(8, 4)), weight_quant=weights))
    tdq.calibrate(model, [(torch.randn(4, 8), TIMESTEPS)])
    model.train()(torch.randn(4, 8), TIMESTEPS).square().sum().backward()
    (rounding,) = (
        p for n, p in model.named_parameters() if "learned_round" in n or "float_to_int" in n
    )
    assert rounding.grad.abs().sum() > 0
    assert tdq.scale_bank(model).biases[-1].grad.abs().sum() > 0
    output = model.eval()(torch.ones(4, 8), TIMESTEPS)
    assert torch.equal(tdq.freeze(model, STEPS)(torch.ones(4, 8), TIMESTEPS), output)


@pytest.mark.parametrize("cached", [False, True])
def test_inference_mode_follows_the_timestep(model, cached):
    timesteps = [*STEPS, TIMESTEPS]
    with torch.no_grad():
        plain = [model(SAMPLE, t) for t in timesteps]
        with quant_inference_mode(model, cache_quant_weight=cached):
            for _ in range(2):
                for timestep, expected in zip(timesteps, plain, strict=True):
                    assert torch.equal(model(SAMPLE, timestep), expected)
        assert torch.equal(model(SAMPLE, STEPS[1]), plain[1])
    assert (plain[0] - plain[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("frozen", "whole"),
    [
        pytest.param(True, False, id="frozen, by Brevitas", marks=pytest.mark.slow),
        pytest.param(True, True, id="frozen, whole"),
        pytest.param(False, True, id="live, whole"),
    ],
)
def test_compiled_in_inference_mode(around, frozen, whole):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model = tdq.attach(quantize_layerwise(around(layers), activation_bits=4)).eval()
    tdq.calibrate(model, [(torch.randn(8, 4) * (1 + t), torch.full((8,), t)) for t in (1, 9)])
    model = tdq.freeze(model, 10) if frozen else model
    sample, timesteps = torch.randn(2, 4), [torch.tensor([t]) for t in range(10)]
    with torch.no_grad():
        plain = [model(sample, t) for t in timesteps]
        with quant_inference_mode(model, compile=not whole):
            model(sample, 0)
            options = {"backend": "aot_eager", "fullgraph": True}
            compiled = torch.compile(model, **options) if whole else model
            for timestep, expected in zip(timesteps, plain, strict=True):
                torch.testing.assert_close(compiled(sample, timestep), expected)
    assert (plain[1] - plain[9]).abs().max() > 1e-3


def test_quantization_switched_off_is_the_float_model(model):
    quantized = error(model)
    off = {"disable_act_quant": True, "disable_weight_quant": True, "disable_bias_quant": True}
    with torch.no_grad(), quantization_status_manager(model, **off):
        assert torch.equal(model(SAMPLE, TIMESTEPS), float_output())
        observed = quantization_status_manager(model, call_act_quantizer_impl=True, **off)
        with observed:
            assert torch.equal(model(SAMPLE, TIMESTEPS), float_output())
    assert error(model) == quantized > 0


def test_scales_that_nobody_asks_for_need_no_calibration():
    torch.manual_seed(0)
    model = tdq.attach(quantize_layerwise(TinyDenoiser().eval(), **W4))
    off = {"disable_act_quant": True, "disable_weight_quant": True}
    with torch.no_grad(), quantization_status_manager(model, **off):
        assert torch.equal(model(SAMPLE, TIMESTEPS), float_output())
    with pytest.raises(CalibrationError, match=r"Run tdq_plugin\.calibrate"):
        model(SAMPLE, TIMESTEPS)


def test_copies_are_independent(model):
    twin = copy.deepcopy(model)
    expected = model(SAMPLE, TIMESTEPS)
    assert torch.equal(twin(SAMPLE, TIMESTEPS), expected)
    with torch.no_grad():
        for value in tdq.scale_bank(twin).state_dict().values():
            value.mul_(3)
    assert torch.equal(model(SAMPLE, TIMESTEPS), expected)
    ours, theirs = ([q for _, q in tdq.named_quantizers(m)] for m in (model, twin))
    assert not {id(q) for q in ours} & {id(q) for q in theirs}


def test_a_state_dict_rebuilds_quantizers_and_keeps_what_attach_gave(model, calibrated):
    fresh = calibrated(**W4)
    fresh = tdq.freeze(fresh, STEPS) if not hasattr(model.scale_bank, "weights") else fresh
    proxies = [m for m in fresh.modules() if isinstance(m, TDQActQuantProxy)]
    before = [proxy.tdq_tensor_quant for proxy in proxies]
    quantizers = dict(tdq.named_quantizers(fresh))
    fresh.conv_in.weight.data.zero_()
    fresh.load_state_dict(model.state_dict())
    assert all(p.tdq_tensor_quant is not old for p, old in zip(proxies, before, strict=True))
    assert dict(tdq.named_quantizers(fresh)) == quantizers
    assert torch.equal(fresh(SAMPLE, TIMESTEPS), model(SAMPLE, TIMESTEPS))
    fresh.conv_in.input_quant.disable_quant = True
    assert not torch.equal(fresh(SAMPLE, TIMESTEPS), model(SAMPLE, TIMESTEPS))


def test_other_bits_after_attach(model):
    proxy = model.conv_in.input_quant
    proxy.quant_injector = proxy.quant_injector.let(bit_width=4)
    with pytest.raises(AdapterError, match=r"'conv_in.input' was attached with .*quant_max=255"):
        proxy.init_tensor_quant()
