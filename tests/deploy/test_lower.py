"""Law 5: integer execution is what was trained, layer by layer."""

import copy

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from deploy.networks import (
    SAMPLE,
    LabelledDenoiser,
    WithEncoder,
    frozen,
    frozen_tiny,
    prepared,
)
from deploy.test_layers import relative_error
from torch import nn
from torch.ao.nn.intrinsic.qat import ConvReLU2d
from torch.ao.quantization import QConfigMapping, default_per_channel_weight_fake_quant

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import TDQFakeQuantize, tdq_qconfig, tdq_qconfig_mapping
from tdq_plugin.deploy import lower_to_int8
from tdq_plugin.deploy.activations import TableCodes, TableValues
from tdq_plugin.deploy.layers import Int8Layer
from tdq_plugin.deploy.weights import int8_layer, weight_quantizer
from tdq_plugin.errors import AdapterError, ConfigError, LookupRuleError, ScaleError, TraceError
from tdq_plugin.fake_quantize import quantize

MIXED = torch.tensor([999, 0, 250, 600])


@pytest.fixture(scope="module")
def model():
    return frozen_tiny()


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def exact_layer(layer):
    """A prepared layer in float64 with its quantized weight."""
    quantizer = weight_quantizer(layer)
    plain = (layer.to_float() if hasattr(layer, "to_float") else copy.deepcopy(layer)).double()
    scale = quantizer.positive_scale().double().reshape(-1, *[1] * (layer.weight.dim() - 1))
    plain.weight = nn.Parameter(quantizer.codes(layer.weight).double() * scale)
    return plain


def layer_errors(reference, lowered, sample, timestep):
    """Relative error of every int8 layer on its own input, by path."""
    errors = {}

    def hook(path):
        def compare(module, args, output):
            values, scale, zero_point = args[0]
            shape = (-1, *[1] * (values.dim() - 1))
            x = (values.double() - zero_point.reshape(shape)) * scale.double().reshape(shape)
            errors[path] = relative_error(output, exact_layer(reference.get_submodule(path))(x))

        return compare

    handles = [
        module.register_forward_hook(hook(path))
        for path, module in lowered.named_modules()
        if isinstance(module, Int8Layer)
    ]
    lowered(sample, timestep)
    for handle in handles:
        handle.remove()
    return errors


def code_differences(model, lowered, timestep, table_timestep):
    """Per quantizer, how many codes differ from the trained fake quantization on the same x."""
    scales, zero_points = model.scale_bank(table_timestep)
    differences = []

    def compare(module, args, output):
        row = int(module.path.rpartition("_")[2])
        grid, x = module.grid, args[0]
        expected = quantize(x, scales[row], zero_points[row], grid.quant_min, grid.quant_max)
        ours = output.values - output.zero_point.reshape(-1, *[1] * (x.dim() - 1)).float()
        expected -= zero_points[row].reshape(-1, *[1] * (x.dim() - 1))
        differences.append((ours != expected).sum().item())

    for path, module in lowered.named_modules():
        if isinstance(module, TableCodes):
            module.path = path
            module.register_forward_hook(compare)
    lowered(SAMPLE, timestep)
    return differences


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("timestep", [250, MIXED])
def test_every_layer_equals_float64_and_every_code_is_the_trained_one(qat, bits, timestep):
    model = frozen_tiny(qat=qat, bits=bits)
    lowered = lower_to_int8(model)
    errors = layer_errors(model, lowered, SAMPLE, timestep)
    assert set(errors) == {
        "conv_in",
        "conv_down",
        "to_query",
        "to_token",
        "conv_1d",
        "conv_out",
    }
    assert max(errors.values()) < 1e-6
    differences = code_differences(model, lower_to_int8(model), timestep, timestep)
    assert differences == [0] * len(differences)
    wrong = code_differences(model, lower_to_int8(model), timestep, 600)
    assert sum(wrong) > 100


class SharedInput(nn.Module):
    """One tensor is multiplied with a weight and with another activation."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, sample, timestep):
        tokens = (sample * (1 + timestep.view(-1, 1, 1, 1) / 1000)).flatten(1, 2)
        weights = torch.matmul(tokens, self.key(tokens).transpose(1, 2)).softmax(-1)
        return weights @ self.value(tokens)


@pytest.mark.parametrize("timestep", [250, MIXED])
def test_one_quantizer_gives_codes_to_layers_and_floats_to_products(timestep):
    model = frozen(model=SharedInput())
    lowered = lower_to_int8(model)
    kinds = [type(m).__name__ for m in lowered.quantizers.modules()][1:]
    assert sorted(kinds) == ["TableCodes"] + 4 * ["TableValues"]
    assert len(model.scale_bank.names) == 4
    assert max(layer_errors(model, lowered, SAMPLE, timestep).values()) < 1e-6
    ours, theirs = lowered(SAMPLE, timestep), model(SAMPLE, timestep)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_table_equals_static_bit_for_bit_and_a_wrong_step_does_not(model, step):
    table = model.scale_bank.table

    def static(row):
        scales = table.scales[row].expand_as(table.scales).contiguous()
        constant = tdq.ScaleTable(table.grids, table.timesteps, scales, table.zero_points)
        return lower_to_int8(tdq.load_scales(copy.deepcopy(model), constant))

    row = STEPS.index(step)
    ours = lower_to_int8(model)(SAMPLE, step)
    assert torch.equal(ours, static(row)(SAMPLE, step))
    assert not torch.equal(ours, static((row + 2) % len(STEPS))(SAMPLE, step))


def test_mixed_batch_is_the_samples_one_by_one(model):
    lowered = lower_to_int8(model)
    together = lowered(SAMPLE, MIXED)
    alone = torch.cat([lowered(SAMPLE[i : i + 1], MIXED[i]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    assert relative_error(lowered(SAMPLE, MIXED.flip(0)), alone) > 0.01
    assert torch.equal(lowered(SAMPLE, torch.full((4,), 250)), lowered(SAMPLE, 250))


@pytest.mark.parametrize("timestep", [250, MIXED])
def test_zero_points_that_move_with_t(timestep):
    model = frozen_tiny()
    table = model.scale_bank.table
    moving = table.zero_points + torch.arange(len(STEPS)).reshape(-1, 1)
    moving = moving.clamp(max=255)
    tdq.load_scales(model, tdq.ScaleTable(table.grids, table.timesteps, table.scales, moving))
    lowered = lower_to_int8(model)
    assert max(layer_errors(model, lowered, SAMPLE, timestep).values()) < 1e-6
    differences = code_differences(model, lowered, timestep, timestep)
    assert differences == [0] * len(differences)


@pytest.mark.parametrize("step", STEPS)
def test_cached_timestep_path_is_bit_equal_for_single_samples(model, step):
    cached, computed = lower_to_int8(model), lower_to_int8(model, cache_timestep_path=False)
    assert not hasattr(cached, "time_embedding")
    assert hasattr(computed, "time_embedding")
    assert torch.equal(cached(SAMPLE[:1], step), computed(SAMPLE[:1], step))
    torch.testing.assert_close(cached(SAMPLE, step), computed(SAMPLE, step), rtol=0.01, atol=0.01)


def labelled():
    label = torch.tensor([1, 3])
    example = (*example_inputs(), label)
    batches = [(x[:2], t[:2], label) for x, t in BATCHES]
    return frozen(model=LabelledDenoiser(), example=example, batches=batches)


@pytest.mark.parametrize("timestep", [torch.tensor(250), torch.tensor([999, 0])])
def test_labels_are_not_cached_and_layers_without_integer_kernel_stay_float(timestep):
    model = labelled()
    lowered = lower_to_int8(model)
    assert not hasattr(lowered, "time_embedding")
    assert type(lowered.conv_in) is nn.Conv2d
    assert type(lowered.conv_out) is nn.Conv2d
    for label in (torch.tensor([0, 4]), torch.tensor([2, 2])):
        ours, theirs = (m(SAMPLE[:2], timestep, label) for m in (lowered, model))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("cache", [True, False])
def test_quantized_weight_behind_a_float_input_is_kept(qat, cache):
    # attach gives layers of the timestep path no activation quantizer.
    graph = tdq.trace(TinyDenoiser(), example_inputs())
    mapping = tdq_qconfig_mapping(graph).set_module_name("time_embedding", tdq_qconfig(8, 2))
    model = frozen(qat=qat, mapping=mapping)
    layer = model.time_embedding
    quantized = weight_quantizer(layer)(layer.weight)
    assert not torch.equal(quantized, layer.weight)
    lowered = lower_to_int8(model, cache_timestep_path=cache)
    layer.weight.copy_(quantized)
    if qat:
        layer.weight_fake_quant.enable_fake_quant(False)
    expected = lower_to_int8(model, cache_timestep_path=cache)
    assert torch.equal(lowered(SAMPLE, 250), expected(SAMPLE, 250))
    if not cache:
        assert type(lowered.time_embedding) is nn.Linear
        assert torch.equal(lowered.time_embedding.weight, quantized)


def test_a_timestep_outside_the_table_is_an_error(model):
    lowered = lower_to_int8(model)
    for timestep in (3, torch.tensor([0, 3, 250, 999])):
        with pytest.raises(LookupRuleError, match="Timestep 3 is not in the frozen table"):
            lowered(SAMPLE, timestep)


@pytest.mark.parametrize("timesteps", [[250, 250, 250], [0, 250, 600], [0, 0]])
def test_as_many_timesteps_as_neither_calls_nor_samples(model, timesteps):
    message = f"^{len(timesteps)} timesteps were given for 4 samples. Give one, or one for each"
    with pytest.raises(ScaleError, match=message):
        lower_to_int8(model)(SAMPLE, torch.tensor(timesteps))


@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("lookup", ["exact", "nearest", "linear"])
def test_equal_rows_serve_no_timestep_outside_of_the_table(model, lookup, cache):
    table = model.scale_bank.table
    rows = table.scales[:1].expand_as(table.scales).contiguous()
    table = tdq.ScaleTable(table.grids, table.timesteps, rows, table.zero_points)
    static = tdq.load_scales(copy.deepcopy(model), table, lookup)
    lowered = lower_to_int8(static, cache_timestep_path=cache and lookup == "exact")
    for timestep in (1000, torch.tensor([0, 1000, 250, 999])):
        with pytest.raises(LookupRuleError, match="Timestep 1000 is not in the frozen table"):
            lowered(SAMPLE, timestep)
    assert lowered(SAMPLE, 250).isfinite().all()


@pytest.mark.parametrize("lookup", ["linear", "nearest"])
def test_cache_needs_exact_lookup(lookup):
    model = frozen_tiny(lookup=lookup)
    with pytest.raises(LookupRuleError, match=f"lookup='{lookup}'.*cache_timestep_path=False"):
        lower_to_int8(model)
    lowered = lower_to_int8(model, cache_timestep_path=False)
    assert code_differences(model, lowered, 130, 130) == [0] * 5


def test_more_timesteps_than_are_remembered(monkeypatch, model):
    monkeypatch.setattr("tdq_plugin.deploy.lookup._REMEMBERED_TIMESTEPS", 2)
    lowered, fresh = lower_to_int8(model), [lower_to_int8(model)(SAMPLE, t) for t in STEPS]
    for _ in range(2):
        for step, expected in zip(STEPS, fresh, strict=True):
            assert torch.equal(lowered(SAMPLE, step), expected)
    assert len(lowered.timestep_lookup._remembered) <= 2


def test_copies_and_state_dicts(model):
    source = lower_to_int8(model)
    other = frozen(batches=[(2 * x, t) for x, t in BATCHES])
    target = lower_to_int8(other)
    before = target(SAMPLE, 250)
    clone = copy.deepcopy(target)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(SAMPLE, 250), source(SAMPLE, 250))
    assert torch.equal(clone(SAMPLE, 250), before)
    assert not torch.equal(before, source(SAMPLE, 250))


def test_the_model_stays_as_it_is(model):
    before = model(SAMPLE, 250)
    lower_to_int8(model)
    assert torch.equal(model(SAMPLE, 250), before)
    assert any(isinstance(module, TDQFakeQuantize) for module in model.modules())


def test_dynamic_activations_need_no_table_and_follow_the_input(model):
    lowered = lower_to_int8(model, activations="dynamic")
    assert not any(isinstance(m, TableCodes | TableValues) for m in lowered.modules())
    outside = lowered(100 * SAMPLE, 250)
    assert outside.isfinite().all()
    assert max(layer_errors(model, lowered, 100 * SAMPLE, 250).values()) < 1e-6


def test_what_cannot_be_lowered_says_why(model):
    unfrozen = tdq.attach(prepared())
    with pytest.raises(AdapterError, match=r"GeneratorBank.*tdq_plugin.freeze"):
        lower_to_int8(unfrozen)
    with pytest.raises(AdapterError, match="Only graphs can be lowered to int8, not Linear"):
        lower_to_int8(nn.Linear(1, 1))
    foreign = copy.deepcopy(model)
    foreign.conv_in.weight_fake_quant = default_per_channel_weight_fake_quant()
    with pytest.raises(AdapterError, match=r"is a FakeQuantize.*TDQWeightFakeQuantize"):
        lower_to_int8(foreign)
    with pytest.raises(AdapterError, match=r"weight is torch.bfloat16.*model.float"):
        lower_to_int8(copy.deepcopy(model).bfloat16())


def test_weights_with_zero_points_are_refused():
    mapping = tdq_qconfig_mapping(
        tdq.trace(TinyDenoiser(), example_inputs()), symmetric_weights=False
    )
    with pytest.raises(
        AdapterError,
        match=r"Conv2d has zero points up to \d+, and .*symmetric_weights=True.*convert",
    ):
        lower_to_int8(frozen(mapping=mapping))


def test_quantized_weights_that_the_graph_does_not_show_are_refused():
    mapping = QConfigMapping().set_object_type(nn.Linear, tdq_qconfig())
    model = frozen(model=WithEncoder(), mapping=mapping)
    with pytest.raises(
        AdapterError,
        match=r"'encoder.linear1' is quantized.*set_module_name\('encoder.linear1', None\)",
    ):
        lower_to_int8(model)


def test_a_layer_fused_with_its_activation_is_refused():
    fused = ConvReLU2d(8, 4, 3, qconfig=tdq_qconfig())
    with pytest.raises(AdapterError, match="ConvReLU2d cannot be lowered to int8"):
        int8_layer(fused)


class WholeBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, sample, timestep):
        return self.conv(sample) * timestep.mean()


class WholeSample(WholeBatch):
    def forward(self, sample, timestep):
        return self.conv(sample) + timestep.reshape(-1, 1, 1, 1).repeat(1, 1, sample.shape[2], 1)


@pytest.mark.parametrize(
    ("network", "message"),
    [(WholeBatch, "gives no value per sample"), (WholeSample, "needs more of the sample")],
)
def test_a_timestep_path_that_is_no_table_is_refused(network, message):
    model = frozen(model=network())
    with pytest.raises(TraceError, match=f"{message}.*cache_timestep_path=False"):
        lower_to_int8(model)
    lowered = lower_to_int8(model, cache_timestep_path=False)
    torch.testing.assert_close(lowered(SAMPLE, 250), model(SAMPLE, 250), rtol=1e-5, atol=1e-4)


class Branching(nn.Module):
    """Values of the timestep path that are no floats: a mask, and an index into a table."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.late = (nn.Conv2d(1, 1, 3, padding=1) for _ in range(2))
        self.shift = nn.Parameter(torch.arange(4.0))

    def forward(self, sample, timestep):
        late = (timestep > 450)[:, None, None, None]
        index = (timestep // 300).long()
        mixed = torch.where(late, self.late(sample), self.early(sample))
        return mixed + self.shift[index].reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("timestep", [250, MIXED])
def test_a_timestep_path_keeps_its_dtypes(timestep):
    model = frozen(model=Branching())
    computed = lower_to_int8(model, cache_timestep_path=False)
    assert torch.equal(lower_to_int8(model)(SAMPLE, timestep), computed(SAMPLE, timestep))


def test_a_quantizer_that_is_switched_off(model):
    switched = copy.deepcopy(model)
    dict(tdq.named_quantizers(switched))["conv_in.input"].mode = "off"
    with pytest.raises(AdapterError, match=r"is in mode 'off'.*Set its mode to 'quantize'"):
        lower_to_int8(switched)


def test_a_quantizer_that_measures_its_input_needs_dynamic_activations(model):
    measuring = copy.deepcopy(model)
    for _, quantizer in tdq.named_quantizers(measuring):
        quantizer.mode = "dynamic"
    with pytest.raises(AdapterError, match="if all are 'dynamic', pass activations='dynamic'"):
        lower_to_int8(measuring)
    lower_to_int8(measuring, activations="dynamic")
    with pytest.raises(ConfigError, match="activations = 'static' is not one of table, dynamic"):
        lower_to_int8(model, activations="static")
