"""Converted graphs equal the model: looked-up scales exactly, folded ones to float precision."""

import copy
import io

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

import tdq_plugin as tdq
from tdq_plugin.adapters.pt2e import TDQQuantizer, TDQWeightFakeQuantize, convert, export
from tdq_plugin.deploy.openvino import to_openvino
from tdq_plugin.errors import AdapterError, ScaleError

SAMPLE = BATCHES[2][0][:4]
# Bits of activations and weights, and how they are prepared.
CASES = [
    ((8, 8), {}),
    ((8, 4), {"symmetric_activations": True}),
    ((4, 4), {}),
    ((4, 4), {"qat": False}),
]
OPERATORS = torch.ops.quantized_decomposed


@pytest.mark.parametrize(("bits", "options"), CASES)
def test_equals_the_model_at_every_timestep(frozen, bits, options):
    model = frozen(*bits, **options)
    one, mixed = convert(model), convert(model, mixed_timesteps=True)
    nodes = one.graph.find_nodes(op="call_function", target=OPERATORS.quantize_per_tensor.tensor)
    assert len(nodes) == len(tdq.scale_bank(model).names)
    with torch.no_grad():
        for step in STEPS:
            assert torch.equal(one(SAMPLE, step), model(SAMPLE, step))
        steps = torch.tensor(STEPS[1:])
        assert torch.equal(mixed(SAMPLE, steps), model(SAMPLE, steps))


@pytest.mark.parametrize(("bits", "options"), CASES)
def test_folded_scales_leave_constant_operators(frozen, bits, options):
    """A code that lies on the border of two may fall to either side in a later layer."""
    model = frozen(*bits, **options)
    folded = convert(model, fold_scales=True)
    called = {node.target for node in folded.graph.nodes}
    assert OPERATORS.quantize_per_tensor.default in called
    assert OPERATORS.quantize_per_tensor.tensor not in called
    steps = torch.tensor(STEPS[1:])
    with torch.no_grad():
        for step in (*STEPS, steps):
            expected = model(SAMPLE, step)
            assert (folded(SAMPLE, step) - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("layer", ["conv2d", "conv1d", "linear"])
def test_a_folded_layer_is_exact(layer):
    class OneLayer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv2d = torch.nn.Conv2d(3, 5, 3, padding=1)
            self.conv1d = torch.nn.Conv1d(3, 5, 3)
            self.linear = torch.nn.Linear(6, 5)

        def forward(self, sample, timestep):
            x = sample if layer == "conv2d" else sample.flatten(2)
            return getattr(self, layer)(x if layer != "linear" else sample)

    torch.manual_seed(0)
    model = prepare_qat_pt2e(
        export(OneLayer(), (torch.zeros(2, 3, 6, 6), torch.tensor([1, 2]))), TDQQuantizer(8, 8)
    )
    x = torch.randn(4, 3, 6, 6)
    tdq.calibrate(tdq.attach(model).eval(), [(x * (1 + t / 500), t) for t in STEPS])
    folded = convert(tdq.freeze(model, STEPS), fold_scales=True)
    with torch.no_grad():
        for step in (*STEPS, torch.tensor(STEPS[1:])):
            torch.testing.assert_close(folded(x, step), model(x, step), rtol=1e-5, atol=1e-6)
        assert not torch.equal(folded(x, 0), folded(x, 999))


def test_a_zero_point_that_moves_cannot_be_folded():
    def bank(grids):
        return tdq.LearnedTableBank(grids, timestep_zero_point=True)

    torch.manual_seed(0)
    prepared = prepare_qat_pt2e(export(TinyDenoiser(), example_inputs()), TDQQuantizer(4, 8))
    model = tdq.attach(prepared, bank).eval()
    tdq.calibrate(model, BATCHES)
    tdq.freeze(model, STEPS)
    with torch.no_grad():
        assert torch.equal(convert(model)(SAMPLE, 250), model(SAMPLE, 250))
    with pytest.raises(AdapterError, match=r"depends on the timestep.*fold_scales=False"):
        convert(model, fold_scales=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("fold", [False, True])
def test_another_precision_is_refused(frozen, dtype, fold):
    with pytest.raises(AdapterError, match=rf"is {dtype}, .*Call model\.float\(\)"):
        convert(frozen().to(dtype), fold_scales=fold)


def test_the_model_itself_stays(frozen):
    model = frozen()
    code, before = model.code, model(SAMPLE, 250)
    convert(model, fold_scales=True)
    convert(model)
    assert model.code == code
    assert torch.equal(model(SAMPLE, 250), before)


@pytest.mark.parametrize("fold", [False, True])
def test_a_model_in_training_mode_is_converted_without_dropout(fold):
    class Dropping(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, sample, timestep):
            return self.last(torch.nn.functional.dropout(self.first(sample), 0.5, self.training))

    example = torch.ones(2, 4), torch.tensor([1, 2])
    model = tdq.attach(prepare_qat_pt2e(export(Dropping(), example), TDQQuantizer())).train()
    x = torch.randn(8, 4)
    tdq.calibrate(model, [(x, step) for step in STEPS], samples=64)
    converted = convert(tdq.freeze(model, STEPS), fold_scales=fold)
    with torch.no_grad():
        assert torch.equal(converted(x, 600), converted(x, 600))
        assert not torch.equal(model(x, 600), model(x, 600)), "the model stays in training mode"


def test_torchao_calls_the_hook(frozen):
    model = frozen(4, 8)
    converted = convert_pt2e(copy.deepcopy(model))
    with torch.no_grad():
        assert torch.equal(converted(SAMPLE, 250), model(SAMPLE, 250))


@pytest.mark.parametrize("fold", [False, True])
def test_exports_saves_and_loads(frozen, fold):
    converted, file = convert(frozen(4, 8), fold_scales=fold), io.BytesIO()
    program = torch.export.export(converted, (SAMPLE, torch.tensor([100])))
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    with torch.no_grad():
        for step in STEPS:
            t = torch.tensor([step])
            torch.testing.assert_close(loaded(SAMPLE, t), converted(SAMPLE, t))


def test_weights_are_kept_as_integers(frozen):
    state = convert(frozen()).state_dict()
    codes = [tensor for tensor in state.values() if tensor.dtype == torch.int8]
    quantized = [m for m in frozen().modules() if isinstance(m, TDQWeightFakeQuantize)]
    assert len(codes) == len(quantized) > 0
    kept_float = {t.shape for t in state.values() if t.is_floating_point() and t.dim() > 2}
    assert not kept_float & {tensor.shape for tensor in codes}


def test_errors(frozen):
    converted = convert(frozen())
    with pytest.raises(ScaleError, match="4 timesteps, and it takes one a call"):
        converted(SAMPLE, torch.tensor(STEPS[1:]))
    live = tdq.attach(prepare_qat_pt2e(export(TinyDenoiser(), example_inputs()), TDQQuantizer()))
    with pytest.raises(AdapterError, match=r"GeneratorBank.*Call tdq_plugin\.freeze"):
        convert(live)


@pytest.mark.parametrize("fold", [False, True])
def test_switched_off_quantizers(frozen, fold):
    model = frozen()
    _, quantizer = next(tdq.named_quantizers(model))
    quantizer.mode = "off"
    with pytest.raises(AdapterError, match=r"in mode 'off'.*Set its mode"):
        convert(model, fold_scales=fold)
    quantizer.mode = "quantize"
    weight = next(m for m in model.modules() if isinstance(m, TDQWeightFakeQuantize))
    weight.disable_fake_quant()
    with pytest.raises(AdapterError, match=r"weight quantizer .* is switched off"):
        convert(model, fold_scales=fold)


@pytest.mark.parametrize("cache", [False, True])
def test_integer_execution_is_not_of_exported_graphs(frozen, cache):
    """Without the check it gave a model that has no integer layer."""
    with pytest.raises(
        AdapterError, match=r"\d+ quantizers.*pt2e\.convert\(model, fold_scales=True"
    ):
        tdq.lower_to_int8(frozen(), cache_timestep_path=cache)


def test_openvino_is_not_for_exported_graphs(frozen):
    with pytest.raises(AdapterError, match=r"pt2e\.convert\(model, fold_scales=True"):
        to_openvino(frozen(), example_inputs())
