"""The reference graph equals the fake-quantized model bit for bit."""

import copy
import io

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import TDQWeightFakeQuantize, convert
from tdq_plugin.errors import AdapterError, ScaleError

SAMPLE = BATCHES[2][0][:4]
BITS = [(8, 8), (8, 4), (4, 4)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_equals_the_model_at_every_timestep(frozen, bits, symmetric):
    model = frozen(*bits, symmetric_activations=symmetric)
    one, mixed = convert(model), convert(model, mixed_timesteps=True)
    dtype = torch.int8 if symmetric else torch.uint8
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.tensor
    nodes = one.graph.find_nodes(op="call_function", target=quantize)
    assert len(nodes) == len(tdq.scale_bank(model).names)
    assert {node.args[-1] for node in nodes} == {dtype}
    with torch.no_grad():
        for step in STEPS:
            assert torch.equal(one(SAMPLE, step), model(SAMPLE, step))
            assert torch.equal(mixed(SAMPLE, step), model(SAMPLE, step))
        steps = torch.tensor(STEPS[1:])
        assert torch.equal(mixed(SAMPLE, steps), model(SAMPLE, steps))


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("bits", BITS)
def test_equals_the_model_with_zero_points_of_weights(prepare, frozen, bits, qat):
    trained = frozen(*bits, symmetric_weights=False)
    model = frozen(*bits, symmetric_weights=False, qat=qat)
    tdq.load_scales(model, trained.scale_bank.table)
    converted = convert(model)
    assert (converted.conv_in.weight_zero_point != 0).any()
    with torch.no_grad():
        for step in STEPS:
            assert torch.equal(converted(SAMPLE, step), trained(SAMPLE, step))


def test_equals_a_real_unet(prepare, unet, unet_inputs):
    model = tdq.attach(prepare(copy.deepcopy(unet), unet_inputs, 4, 8)).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(4, 1, 8, 8, generator=generator), step) for step in STEPS]
    tdq.calibrate(model, batches)
    tdq.freeze(model, STEPS)
    with torch.no_grad():
        for x, step in batches:
            assert torch.equal(convert(model)(x, step), model(x, step))
        x, steps = batches[0][0], torch.tensor(STEPS[1:])
        assert torch.equal(convert(model, mixed_timesteps=True)(x, steps), model(x, steps))


def test_a_moving_zero_point_is_converted(prepare):
    def bank(grids):
        return tdq.LearnedTableBank(grids, timestep_zero_point=True)

    torch.manual_seed(0)
    model = tdq.attach(prepare(TinyDenoiser(), example_inputs(), 4, 8), bank)
    tdq.calibrate(model, BATCHES)
    tdq.freeze(model.eval(), STEPS)
    assert tdq.scale_bank(model).zero_points.shape[0] == len(STEPS)
    with torch.no_grad():
        for step in STEPS:
            assert torch.equal(convert(model)(SAMPLE, step), model(SAMPLE, step))


@pytest.mark.parametrize("bits", BITS)
def test_ptq_quantizes_weights_at_conversion(prepare, frozen, bits):
    """prepare_fx keeps weights float; converted, they are what QAT starts from."""
    ptq, qat = frozen(*bits, qat=False), frozen(*bits, qat=True)
    assert type(ptq.conv_down) is nn.Conv2d
    tdq.load_scales(qat, tdq.load_scales(ptq, qat.scale_bank.table).scale_bank.table)
    converted = convert(ptq)
    quantizer = TDQWeightFakeQuantize(bits[1])
    quantizer.initialise(ptq.conv_down.weight)
    assert torch.equal(converted.conv_down.get_weight(), quantizer(ptq.conv_down.weight))
    with torch.no_grad():
        for step in STEPS:
            assert torch.equal(converted(SAMPLE, step), qat(SAMPLE, step))
            assert not torch.equal(ptq(SAMPLE, step), qat(SAMPLE, step))


def test_the_model_itself_stays(frozen):
    model = frozen()
    code, before = model.code, model(SAMPLE, 250)
    convert(model)
    assert model.code == code
    assert torch.equal(model(SAMPLE, 250), before)


def test_torch_ao_calls_the_hook(frozen):
    from torch.ao.quantization.quantize_fx import _convert_to_reference_decomposed_fx

    from tdq_plugin.adapters.torch_ao import tdq_backend_config

    model = frozen(4, 8)
    converted = _convert_to_reference_decomposed_fx(
        copy.deepcopy(model), backend_config=tdq_backend_config()
    )
    with torch.no_grad():
        assert torch.equal(converted(SAMPLE, 250), model(SAMPLE, 250))


@pytest.mark.parametrize("torch_ao", [convert_fx, convert_to_reference_fx])
@pytest.mark.parametrize("qat", [True, False])
def test_torch_ao_s_static_conversion_is_refused(frozen, torch_ao, qat):
    with pytest.raises(AdapterError, match=r"no single scale.*torch_ao\.convert"):
        torch_ao(frozen(qat=qat))


@pytest.mark.parametrize("mixed", [False, True])
def test_export(frozen, mixed):
    model = frozen(4, 8)
    converted = convert(model, mixed_timesteps=mixed)
    steps = torch.tensor(STEPS[:4] if mixed else [100])
    with torch.no_grad():
        program = torch.export.export(converted, (SAMPLE, steps))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        for step in (0, 250, 999):
            timestep = torch.full_like(steps, step)
            assert torch.equal(loaded(SAMPLE, timestep), model(SAMPLE, timestep))
        with pytest.raises(RuntimeError, match="not in the frozen scale table"):
            loaded(SAMPLE, torch.full_like(steps, 3))


def test_export_with_any_batch_size(frozen):
    model = frozen(4, 8)
    shapes = {"sample": {0: torch.export.Dim("batch", min=2, max=64)}, "timestep": None}
    with torch.no_grad():
        program = torch.export.export(
            convert(model), (SAMPLE, torch.tensor([100])), dynamic_shapes=shapes
        )
        wide = BATCHES[1][0]
        timestep = torch.tensor([600])
        assert torch.equal(program.module()(wide, timestep), model(wide, timestep))


def test_state_dict(frozen, tmp_path):
    first, second = convert(frozen()), convert(frozen())
    with torch.no_grad():
        first.conv_in.weight.mul_(1.5)
        first.scale_bank.scales.mul_(0.5)
    assert not torch.equal(first(SAMPLE, 250), second(SAMPLE, 250))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(first(SAMPLE, 250), second(SAMPLE, 250))


def test_a_batch_of_timesteps_needs_mixed(frozen):
    with pytest.raises(ScaleError, match=r"called with 4 timesteps.*mixed_timesteps=True"):
        convert(frozen())(SAMPLE, torch.tensor(STEPS[:4]))


def test_a_batch_of_timesteps_that_does_not_divide(frozen):
    model = convert(frozen(), mixed_timesteps=True)
    with pytest.raises(ScaleError, match="3 scales cannot be spread over a leading dimension of 4"):
        model(SAMPLE, torch.tensor([0, 100, 250]))


def test_models_that_cannot_be_converted(prepare, frozen):
    model = prepare(TinyDenoiser(), example_inputs())
    with pytest.raises(AdapterError, match=r"Call tdq_plugin\.attach"):
        convert(model)
    with pytest.raises(AdapterError, match=r"GeneratorBank.*tdq_plugin\.freeze"):
        convert(tdq.attach(model))
    model = frozen()
    _, quantizer = next(tdq.named_quantizers(model))
    quantizer.mode = "off"
    with pytest.raises(AdapterError, match="in mode 'off'"):
        convert(model)
    quantizer.mode = "quantize"
    model.conv_in.weight_fake_quant.enabled = False
    with pytest.raises(AdapterError, match="'conv_in' is switched off"):
        convert(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision_is_refused(frozen, dtype):
    with pytest.raises(AdapterError, match=rf"is {dtype}, .*Call model\.float\(\)"):
        convert(frozen().to(dtype))


@pytest.mark.parametrize("qat", [True, False])
def test_padding_that_torch_ao_would_lose(prepare, qat):
    model = TinyDenoiser()
    model.conv_down = nn.Conv2d(8, 8, 3, stride=2, padding=1, padding_mode="circular")
    prepared = tdq.attach(prepare(model, example_inputs(), qat=qat))
    tdq.calibrate(prepared, BATCHES)
    tdq.freeze(prepared, STEPS)
    with pytest.raises(AdapterError, match="'conv_down' pads by 'circular'"):
        convert(prepared)
