"""Whole models on OpenVINO."""

import copy

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from cpu import needs_vnni
from deploy.networks import SAMPLE, frozen, frozen_tiny, prepared
from deploy.test_layers import relative_error
from deploy.test_lower import SharedInput, labelled
from torch import nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.deploy import load_int8, lower_to_int8, save_int8
from tdq_plugin.deploy.openvino import to_openvino
from tdq_plugin.errors import (
    AdapterError,
    LookupRuleError,
    ScaleError,
    TimestepError,
    TraceError,
)
from tdq_plugin.scales import FrozenBank

MIXED = torch.tensor([999, 0, 250, 600])
LAYERS = ["conv_1d", "conv_down", "conv_in", "conv_out", "to_query", "to_token"]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def relative_to_quantization(frozen_model, ours, timestep):
    """How far an output is from the fake-quantized one, in units of the quantization error."""
    theirs = frozen_model(SAMPLE, timestep)
    reference = copy.deepcopy(frozen_model)
    for _, quantizer in tdq.named_quantizers(reference):
        quantizer.mode = "off"
    error = theirs - reference(SAMPLE, timestep)
    return ((ours - theirs).norm() / error.norm()).item()


def test_every_layer_runs_on_integers_and_products_stay_float(tiny):
    _, model = tiny
    report = model.report
    assert report.integer_layers == LAYERS
    assert report.lost_layers == []
    assert report.moved == [f"{name}.input" for name in ("conv_in", "conv_down")] + [
        "to_query.input",
        "conv_1d.input",
        "conv_out.input",
    ]
    assert {name for name, readers in report.readers_left.items() if readers} == {
        "product.0.0",
        "product.0.1",
        "product.1.0",
        "product.1.1",
    }


@needs_vnni
@pytest.mark.parametrize("timestep", [*STEPS, MIXED])
def test_the_model_is_the_trained_one_and_a_wrong_step_is_not(tiny, timestep):
    frozen_model, model = tiny
    wrong = MIXED.flip(0) if timestep is MIXED else STEPS[STEPS.index(timestep) - 2]
    right = relative_to_quantization(frozen_model, model(SAMPLE, timestep), timestep)
    assert right < 0.05
    assert relative_to_quantization(frozen_model, model(SAMPLE, wrong), timestep) > 1


@needs_vnni
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_any_batch_size_with_one_or_several_timesteps(tiny, batch):
    frozen_model, model = tiny
    sample = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    for timestep in (600, torch.tensor(STEPS[:batch])):
        assert relative_error(model(sample, timestep), frozen_model(sample, timestep)) < 1e-3


def test_a_saved_int8_model_is_converted_as_it_is(tmp_path, tiny):
    frozen_model, direct = tiny
    save_int8(lower_to_int8(frozen_model), tmp_path)
    loaded = load_int8(tmp_path, TinyDenoiser(), example_inputs())
    converted = to_openvino(loaded, example_inputs())
    assert torch.equal(converted(SAMPLE, 250), direct(SAMPLE, 250))
    assert relative_error(loaded(SAMPLE, 250), frozen_model(SAMPLE, 250)) < 1e-3


@needs_vnni
def test_constant_scales_need_no_ratio():
    model = frozen_tiny()
    table = tdq.scale_bank(model).table
    row = table.scales[2].expand_as(table.scales).contiguous()
    tdq.load_scales(model, tdq.ScaleTable(table.grids, table.timesteps, row, table.zero_points))
    converted = to_openvino(model, example_inputs())
    assert converted.report.readers_left == {}
    assert converted.report.integer_layers == LAYERS
    assert relative_error(converted(SAMPLE, 250), model(SAMPLE, 250)) < 1e-3


@needs_vnni
def test_one_quantizer_for_a_layer_and_a_product():
    model = frozen(model=SharedInput())
    converted = to_openvino(model, example_inputs())
    assert converted.report.integer_layers == ["key", "value"]
    assert len(converted.report.readers_left) == 4
    for timestep in (250, MIXED):
        ours, theirs = converted(SAMPLE, timestep), model(SAMPLE, timestep)
        assert relative_error(ours, theirs) < 1e-3


@needs_vnni
def test_computed_timestep_path_and_nearest_lookup():
    model = frozen_tiny(lookup="nearest")
    converted = to_openvino(model, example_inputs(), cache_timestep_path=False)
    for timestep in (170, 180, 998.5, MIXED):
        ours, theirs = converted(SAMPLE, timestep), model(SAMPLE, timestep)
        assert relative_error(ours, theirs) < 1e-3


@needs_vnni
@pytest.mark.parametrize("cache", [True, False])
def test_a_table_of_one_timestep(tiny, cache):
    model = copy.deepcopy(tiny[0])
    table = tdq.scale_bank(model).table
    row = (table.timesteps[2:3], table.scales[2:3], table.zero_points)
    tdq.load_scales(model, tdq.ScaleTable(table.grids, *row))
    converted = to_openvino(model, example_inputs(), cache_timestep_path=cache)
    assert relative_error(converted(SAMPLE, 250), model(SAMPLE, 250)) < 1e-3


def test_further_inputs():
    model = labelled()
    example = (*example_inputs(), torch.tensor([1, 3]))
    converted = to_openvino(model, example)
    assert converted.input_names == ("sample", "timestep", "label")
    # Both of its layers pad in ways that lower_to_int8 has no integer kernel for.
    assert converted.report.integer_layers == converted.report.lost_layers == []
    for label in (torch.tensor([0, 4]), torch.tensor([2, 2])):
        ours = converted(SAMPLE[:2], 250, label=label)
        assert relative_error(ours, model(SAMPLE[:2], 250, label)) < 1e-3
    assert relative_error(ours, model(SAMPLE[:2], 250, torch.tensor([0, 4]))) > 0.01


class Sliced(nn.Module):
    """A stripped model whose quantizer and layer have a slice between them."""

    def __init__(self, bank, slices=True) -> None:
        super().__init__()
        self.bank, self.slices = bank, slices
        self.conv = nn.Conv2d(4, 8, 3)

    def forward(self, sample, timestep):
        row = (self.bank.timesteps - timestep[:1]).abs().argmin(dim=0, keepdim=True)
        ratio = self.bank.scales.index_select(0, row)[0, 0] / self.bank.scales[0, 0]
        step = self.bank.scales[0, 0].item()
        value = torch.fake_quantize_per_tensor_affine(sample / ratio, step, 128, 0, 255) * ratio
        weight = torch.fake_quantize_per_channel_affine(
            self.conv.weight,
            torch.full((8,), 0.003),
            torch.zeros(8, dtype=torch.int32),
            0,
            -128,
            127,
        )
        value = value[:, :, 1:] if self.slices else value
        return nn.functional.conv2d(value, weight, self.conv.bias)


def sliced(**options):
    torch.manual_seed(0)
    table = tdq.ScaleTable(
        {"conv.input": tdq.activation_grid(8)},
        torch.tensor([0.0, 500.0, 999.0]),
        torch.tensor([[0.02], [0.03], [0.01]]),
        torch.tensor([[128.0]]),
    )
    return Sliced(FrozenBank(table), **options), (torch.randn(2, 4, 8, 8), torch.zeros(2))


def test_a_module_that_has_the_ratios_in_its_own_forward():
    module, example = sliced(slices=False)
    converted = to_openvino(module, example)
    assert len(converted.report.integer_layers) == 1
    assert len(converted.report.moved) == 1
    for timestep in (0.0, 500.0, 999.0):
        expected = module(example[0], torch.tensor([timestep]))
        assert relative_error(converted(example[0], timestep), expected) < 1e-5
    with pytest.raises(TimestepError, match=r"one timestep a call, not \[0.0, 500.0\]"):
        converted(example[0], torch.tensor([0, 500]))


def test_a_lost_layer_is_named():
    module, example = sliced()
    with pytest.warns(UserWarning, match=r"run in float: .*_convolution.*`readers_left`"):
        converted = to_openvino(module, example)
    assert len(converted.report.lost_layers) == 1
    assert "stays in front of Slice" in str(converted.report)
    expected = module(example[0], torch.tensor([500.0]))
    assert relative_error(converted(example[0], 500), expected) < 1e-5


def test_what_cannot_be_converted_says_why(tiny):
    frozen_model, _ = tiny
    with pytest.raises(AdapterError, match=r"GeneratorBank.*tdq_plugin.freeze"):
        to_openvino(tdq.attach(prepared()), example_inputs())
    with pytest.raises(AdapterError, match="dynamic activations has no scale table"):
        to_openvino(lower_to_int8(frozen_model, activations="dynamic"), example_inputs())
    with pytest.raises(AdapterError, match="This Linear is neither a frozen graph nor"):
        to_openvino(nn.Linear(1, 1), example_inputs())
    with pytest.raises(TraceError, match=r"do not fit.*\['sample', 'timestep'\]"):
        to_openvino(frozen_model, (1, 2, 3))
    with pytest.raises(TraceError, match=r"are tensors; the example gives {'sample': 'NoneType'}"):
        to_openvino(frozen_model, (None, 2))
    linear = frozen_tiny(lookup="linear")
    with pytest.raises(LookupRuleError, match="cannot interpolate"):
        to_openvino(linear, example_inputs(), cache_timestep_path=False)
    nearest = frozen_tiny(lookup="nearest")
    with pytest.raises(LookupRuleError, match=r"lookup='nearest'.*cache_timestep_path=False"):
        to_openvino(nearest, example_inputs())


class Sigma(nn.Module):
    """The timestep by another name, and another form of the output if wanted."""

    def __init__(self, form=lambda output: output):
        super().__init__()
        self.conv, self.form = nn.Conv2d(1, 1, 3, padding=1), form

    def forward(self, sample, sigma):
        return self.form(self.conv(sample * (1 + sigma.reshape(-1, 1, 1, 1) / 1000)))


def sigma(**options):
    example = example_inputs()
    graph = tdq.trace(Sigma(**options), example, timestep_argument="sigma").train()
    mapping = tdq_qconfig_mapping(graph, 8, 8)
    model = prepare_qat_fx(graph, mapping, example, backend_config=tdq_backend_config()).eval()
    tdq.calibrate(tdq.attach(model, timestep_argument="sigma"), BATCHES)
    return tdq.freeze(model, STEPS)


def test_a_timestep_of_another_name():
    model = sigma()
    converted = to_openvino(model, example_inputs())
    assert converted.timestep_input == "sigma"
    timesteps = torch.tensor([250])
    torch.testing.assert_close(converted(SAMPLE, timesteps), model(SAMPLE, timesteps))


def test_outputs_that_are_no_tensors():
    with pytest.raises(TraceError, match=r"cannot be traced.*inputs and outputs must be tensors"):
        to_openvino(sigma(form=lambda output: {"sample": output}), example_inputs())


def test_models_that_return_a_tuple():
    converted = to_openvino(sigma(form=lambda output: (output,)), example_inputs())
    assert converted(SAMPLE, 250).shape == SAMPLE.shape
    with pytest.raises(TraceError, match=r"returns 2 tensors.*returns the prediction alone"):
        to_openvino(sigma(form=lambda output: (output, output.exp())), example_inputs())


def test_zero_points_that_move_with_t_are_refused():
    model = frozen_tiny()
    table = tdq.scale_bank(model).table
    moving = table.zero_points.repeat(len(STEPS), 1)
    moving[1, 2] += 1
    tdq.load_scales(model, tdq.ScaleTable(table.grids, table.timesteps, table.scales, moving))
    name = table.names[2]
    with pytest.raises(ScaleError, match=rf"of 1 quantizers move with t \(first: \['{name}'\]\)"):
        to_openvino(model, example_inputs())
