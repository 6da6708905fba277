"""Exported models: the graph takes t and gives what the frozen model gives, in every format."""

import json
from functools import partial

import brevitas.nn as qnn
import onnx
import onnxruntime
import pytest
import torch
from brevitas.export import export_onnx_qcdq
from brevitas.export.inference import quant_inference_mode
from brevitas.quant import (
    Int8BiasPerTensorFloatInternalScaling,
    Int8WeightPerChannelFloatMSE,
)
from contract.networks import STEPS
from qonnx.core.modelwrapper import ModelWrapper
from qonnx.core.onnx_exec import execute_onnx
from qonnx.transformation.infer_shapes import InferShapes
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import (
    TDQInt8ActPerTensorFloat,
    TDQShiftedUint8ActPerTensorFloat,
    TDQUint8ActPerTensorFloat,
    export_onnx,
    export_torch,
)
from tdq_plugin.deploy.halves import has_32_bit_sums
from tdq_plugin.errors import AdapterError, ConfigError, LookupRuleError, TimestepError

WEIGHTS = {"bias_quant": None, "weight_quant": Int8WeightPerChannelFloatMSE}
ONE, EACH = torch.tensor(0), torch.tensor(STEPS[:2])
FORMS = pytest.mark.parametrize("example", [ONE, EACH], ids=["one t", "one t per sample"])


class Parallel(nn.Module):
    """Layers that all see the sample itself: what a code is depends on no other layer."""

    def __init__(self, activation) -> None:
        super().__init__()
        self.conv = qnn.QuantConv2d(3, 4, (3, 3), padding=1, input_quant=activation, **WEIGHTS)
        self.transposed = qnn.QuantConvTranspose2d(3, 4, (1, 1), input_quant=activation, **WEIGHTS)
        self.linear = qnn.QuantLinear(8, 8, True, input_quant=activation, **WEIGHTS)
        self.identity = qnn.QuantIdentity(act_quant=activation)
        self.relu = qnn.QuantReLU(act_quant=TDQUint8ActPerTensorFloat.let(bit_width=5))

    def forward(self, sample, timestep, scaled=True):
        outputs = self.conv(sample) + self.transposed(sample)
        rest = self.linear(sample) + self.identity(sample) + self.relu(sample)
        return {0: outputs, 1: rest}[0] + rest[:, :1] * (2 if scaled else 1)


ACTIVATIONS = {
    "signed, 8 bits": TDQInt8ActPerTensorFloat,
    "signed, 4 bits": TDQInt8ActPerTensorFloat.let(bit_width=4),
    "narrow": TDQInt8ActPerTensorFloat.let(narrow_range=True),
    "shifted, 8 bits": TDQShiftedUint8ActPerTensorFloat,
    "shifted, 3 bits": TDQShiftedUint8ActPerTensorFloat.let(bit_width=3),
    "Brevitas' arithmetic": TDQInt8ActPerTensorFloat.let(tdq_estimator="brevitas"),
    "power of two": TDQInt8ActPerTensorFloat.let(restrict_scaling_type="power_of_two"),
}


def with_scales(model, moving=False, **lookup):
    """Freeze by a table that needs no calibration; its scales differ in every entry."""
    bank = tdq.scale_bank(tdq.attach(model.eval()))
    grids = dict(zip(bank.names, bank.grids, strict=True))
    factors = torch.arange(len(STEPS))[:, None] / 3 + torch.arange(len(grids)) / 7 + 1
    limits = torch.tensor([[max(-grid.quant_min, grid.quant_max) for grid in grids.values()]])
    centres = [0 if grid.symmetric else grid.quant_max // 2 for grid in grids.values()]
    zeros = torch.tensor([centres], dtype=torch.float32)
    if moving:
        zeros = zeros + torch.arange(len(STEPS))[:, None] % 2
    table = tdq.ScaleTable(grids, torch.tensor(STEPS, dtype=torch.float32), factors / limits, zeros)
    return tdq.load_scales(model, table, **lookup)


@pytest.fixture(params=ACTIVATIONS)
def parallel(request):
    torch.manual_seed(0)
    return with_scales(Parallel(ACTIVATIONS[request.param]))


@pytest.fixture(params=["narrow", "shifted, 3 bits"])
def signed_or_shifted(request):
    torch.manual_seed(0)
    return with_scales(Parallel(ACTIVATIONS[request.param]))


@pytest.fixture
def small():
    torch.manual_seed(0)
    return with_scales(Parallel(TDQShiftedUint8ActPerTensorFloat.let(bit_width=4)))


def samples(count, *shape):
    return torch.randn(count, *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(count))


def session(path):
    options = onnxruntime.SessionOptions()
    # Else it rounds the inputs of linear layers to 8 bits once more, where it sees them as float.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not has_32_bit_sums():
        # Its int8 kernels cut sums off on this CPU; without them it computes in float.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    # The tests are about values that are no numbers, too, and onnxruntime is not asked to tell.
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(engine, sample, timestep):
    feed = {"sample": sample.numpy(), "timestep": timestep.numpy()}
    return torch.from_numpy(engine.run(None, feed)[0])


def timesteps_like(example, step, batch):
    """One timestep, or one for each sample, of which the first is `step`."""
    if example.dim() == 0:
        return torch.tensor(step)
    first = STEPS.index(step)
    return torch.tensor([STEPS[(first + i) % len(STEPS)] for i in range(batch)])


def assert_agrees(output, expected):
    assert output.shape == expected.shape
    assert (output - expected).norm() <= 1e-6 * expected.norm()


@FORMS
@torch.no_grad()
def test_onnxruntime_agrees_at_every_timestep_and_batch_size(parallel, example, tmp_path):
    export_onnx(parallel, tmp_path / "model.onnx", (samples(2), example))
    engine = session(tmp_path / "model.onnx")
    outputs = []
    for batch in (1, 2, 5):
        for step in STEPS:
            sample, timestep = samples(batch), timesteps_like(example, step, batch)
            outputs.append(run(engine, sample, timestep))
            assert_agrees(outputs[-1], parallel(sample, timestep))
    # The scales do differ, so that a wrong one would be seen.
    assert (outputs[0] - outputs[1]).norm() > 1e-3 * outputs[0].norm()


@FORMS
@torch.no_grad()
def test_torchscript_is_bit_equal_at_every_timestep_and_batch_size(signed_or_shifted, example):
    traced = export_torch(signed_or_shifted, (samples(2), example))
    for batch in (1, 2, 5):
        for step in STEPS:
            sample, timestep = samples(batch), timesteps_like(example, step, batch)
            assert torch.equal(traced(sample, timestep), signed_or_shifted(sample, timestep))


@FORMS
@torch.no_grad()
def test_qonnx_agrees(signed_or_shifted, example, tmp_path):
    path = tmp_path / "model.onnx"
    options = {"format": "qonnx", "dynamic_batch": False}
    export_onnx(signed_or_shifted, path, (samples(2), example), **options)
    model = ModelWrapper(str(path)).transform(InferShapes())
    for step in STEPS[1:3]:
        sample, timestep = samples(2), timesteps_like(example, step, 2)
        feed = {"sample": sample.numpy(), "timestep": timestep.numpy()}
        output = torch.from_numpy(execute_onnx(model, feed)["output"])
        assert_agrees(output, signed_or_shifted(sample, timestep))


@pytest.mark.filterwarnings("ignore:`torch.jit.load` is deprecated:DeprecationWarning")
@torch.no_grad()
def test_a_torchscript_file(small, tmp_path):
    traced = export_torch(small, (samples(2), ONE), tmp_path / "model.pt")
    loaded = torch.jit.load(tmp_path / "model.pt")
    assert torch.equal(loaded(samples(3), ONE), traced(samples(3), ONE))


class SelfAttention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        activation = TDQShiftedUint8ActPerTensorFloat.let(bit_width=6)
        slots = ("in_proj_input", "q_scaled", "k_transposed", "v", "out_proj_input")
        self.attention = qnn.QuantMultiheadAttention(
            8,
            2,
            in_proj_bias_quant=None,
            out_proj_bias_quant=None,
            attn_output_weights_quant=TDQUint8ActPerTensorFloat.let(bit_width=6),
            **{f"{slot}_quant": activation for slot in slots},
            **options,
        )

    def forward(self, sample, timestep):
        return self.attention(sample, sample, sample)[0]


@FORMS
@pytest.mark.parametrize("packed", [True, False])
@torch.no_grad()
def test_attention_has_a_timestep_for_each_sample_and_its_heads(packed, example, tmp_path):
    torch.manual_seed(0)
    model = with_scales(SelfAttention(batch_first=True, packed_in_proj=packed))
    export_onnx(model, tmp_path / "model.onnx", (samples(2, 4, 8), example))
    traced = export_torch(model, (samples(2, 4, 8), example))
    for step in STEPS:
        sample, timestep = samples(2, 4, 8), timesteps_like(example, step, 2)
        expected = model(sample, timestep)
        assert_agrees(run(session(tmp_path / "model.onnx"), sample, timestep), expected)
        assert_agrees(traced(sample, timestep), expected)


@torch.no_grad()
def test_attention_with_samples_in_the_second_dimension(tmp_path):
    torch.manual_seed(0)
    model = with_scales(SelfAttention(batch_first=False))
    options = {"dynamic_batch": False}
    export_onnx(model, tmp_path / "model.onnx", (samples(2, 2, 8), EACH), **options)
    for step in STEPS:
        sample, timestep = samples(2, 2, 8), timesteps_like(EACH, step, 2)
        output = run(session(tmp_path / "model.onnx"), sample, timestep)
        assert_agrees(output, model(sample, timestep))


@FORMS
@torch.no_grad()
def test_a_timestep_that_is_not_in_the_table_gives_nan(small, example, tmp_path):
    export_onnx(small, tmp_path / "model.onnx", (samples(2), example))
    engine = session(tmp_path / "model.onnx")
    traced = export_torch(small, (samples(2), example))
    for step in (-1, 1, 998, 1000):
        timestep = torch.tensor(step) if example.dim() == 0 else torch.tensor([step, 999])
        for output in (run(engine, samples(2), timestep), traced(samples(2), timestep)):
            assert output[0].isnan().all()
            assert output[1].isnan().all() == (example.dim() == 0)


@pytest.mark.parametrize("lookup", ["nearest", "linear"])
@torch.no_grad()
def test_other_lookup_rules_are_exported_for_integers(lookup, tmp_path):
    torch.manual_seed(0)
    model = with_scales(Parallel(TDQInt8ActPerTensorFloat), lookup=lookup)
    export_onnx(model, tmp_path / "model.onnx", (samples(2), ONE))
    engine = session(tmp_path / "model.onnx")
    for step in (0, 49, 50, 51, 700, 998, 999):
        sample, timestep = samples(2), torch.tensor(step)
        assert_agrees(run(engine, sample, timestep), model(sample, timestep))
    assert run(engine, samples(2), torch.tensor(1000)).isnan().all()


@torch.no_grad()
def test_float_timesteps(small, tmp_path):
    export_onnx(small, tmp_path / "model.onnx", (samples(2), torch.tensor(0.0)))
    engine = session(tmp_path / "model.onnx")
    timestep = torch.tensor(float(STEPS[2]))
    assert_agrees(run(engine, samples(2), timestep), small(samples(2), timestep))
    assert run(engine, samples(2), timestep + 0.5).isnan().all()


@torch.no_grad()
def test_zero_points_that_move_with_t(tmp_path):
    torch.manual_seed(0)
    model = with_scales(Parallel(TDQShiftedUint8ActPerTensorFloat.let(bit_width=4)), moving=True)
    export_onnx(model, tmp_path / "model.onnx", (samples(2), ONE))
    engine, traced = session(tmp_path / "model.onnx"), export_torch(model, (samples(2), ONE))
    for step in STEPS:
        sample, timestep = samples(2), torch.tensor(step)
        assert_agrees(run(engine, sample, timestep), model(sample, timestep))
        assert torch.equal(traced(sample, timestep), model(sample, timestep))
    with pytest.raises(AdapterError, match=r"'conv\.input' moves with t.* or use qonnx"):
        export_onnx(model, tmp_path / "other.onnx", (samples(2), EACH))
    assert not (tmp_path / "other.onnx").exists()


@FORMS
def test_the_graph_is_clean(small, example, tmp_path):
    export_onnx(small, tmp_path / "model.onnx", (samples(2), example))
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    graph = model.graph
    assert [value.name for value in graph.input] == ["sample", "timestep"]
    assert [value.name for value in graph.output] == ["output"]
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert len(graph.input[1].type.tensor_type.shape.dim) == example.dim()
    (entry,) = model.metadata_props
    assert (entry.key, json.loads(entry.value)) == ("tdq_timesteps", list(STEPS))
    assert "Identity" not in {node.op_type for node in graph.node}


def test_scales_come_from_one_table_and_zero_points_are_constants(small, tmp_path):
    export_onnx(small, tmp_path / "model.onnx", (samples(2), ONE))
    graph = onnx.load(tmp_path / "model.onnx").graph
    makers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    quantizers = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == len(tdq.scale_bank(small).names)
    tables = set()
    for node in quantizers:
        scale, zero_point = node.input[1:]
        assert constants[zero_point].dtype == "uint8"
        path = [makers[scale].op_type]
        while scale not in constants:
            scale = makers[scale].input[0]
            path.append(makers[scale].op_type if scale in makers else scale)
        assert path[:-1] == ["Reshape", "Gather", "Transpose", "Gather"]
        tables.add(scale)
    (table,) = tables
    assert (constants[table][1:] == tdq.scale_bank(small).scales.numpy()).all()
    weights = [value for value in constants.values() if value.dtype == "int8" and value.ndim > 1]
    assert len(weights) == 3


def test_biases_with_a_scale_of_their_own(tmp_path):
    torch.manual_seed(0)
    layer = partial(
        qnn.QuantConv2d, 3, 4, (3, 3), weight_quant=Int8WeightPerChannelFloatMSE, padding=1
    )
    model = Parallel(TDQInt8ActPerTensorFloat)
    model.conv = layer(
        input_quant=TDQInt8ActPerTensorFloat, bias_quant=Int8BiasPerTensorFloatInternalScaling
    )
    with_scales(model)
    export_onnx(model, tmp_path / "model.onnx", (samples(2), ONE))
    with torch.no_grad():
        expected = model(samples(2), STEPS[1])
    output = run(session(tmp_path / "model.onnx"), samples(2), torch.tensor(STEPS[1]))
    assert_agrees(output, expected)


def test_arguments_by_name_and_constants(small, tmp_path):
    inputs = {"timestep": STEPS[1], "sample": samples(2), "scaled": False}
    export_onnx(small, tmp_path / "model.onnx", inputs)
    with torch.no_grad():
        expected = small(samples(2), STEPS[1], scaled=False)
    output = run(session(tmp_path / "model.onnx"), samples(2), torch.tensor(STEPS[1]))
    assert_agrees(output, expected)


class Conditioned(nn.Module):
    """Takes what further conditions there are by name."""

    def __init__(self):
        super().__init__()
        self.linear = qnn.QuantLinear(2, 2, True, input_quant=TDQInt8ActPerTensorFloat, **WEIGHTS)

    def forward(self, sample, timestep, **conditions):
        return self.linear(sample) + conditions.get("shift", 0)


def test_further_arguments_by_name_are_inputs():
    model = with_scales(Conditioned())
    sample, shift = torch.randn(3, 2), torch.randn(3, 2)
    traced = export_torch(model, {"sample": sample, "timestep": ONE, "shift": shift})
    assert torch.equal(traced(sample, ONE, shift * 2), model(sample, ONE, shift=shift * 2))


def test_the_model_stays_as_it_is(small, tmp_path):
    bank, before = tdq.scale_bank(small), small(samples(2), EACH)
    export_onnx(small, tmp_path / "model.onnx", (samples(2), ONE))
    export_torch(small, (samples(2), ONE))
    assert tdq.scale_bank(small) is bank
    assert torch.equal(small(samples(2), EACH), before)


def both(model, tmp_path, match):
    for export in (
        partial(export_onnx, model, tmp_path / "model.onnx"),
        partial(export_torch, model),
    ):
        with pytest.raises(AdapterError, match=match):
            export((samples(2), ONE))
    assert not list(tmp_path.iterdir())


def test_export_before_freeze(tmp_path):
    model = Parallel(TDQInt8ActPerTensorFloat).eval()
    both(model, tmp_path, r"no scale bank\. Call tdq_plugin\.attach")
    tdq.attach(model)
    both(model, tmp_path, r"bank is a GeneratorBank.*Call tdq_plugin\.freeze\(model, timesteps\)")


def test_quantizers_that_an_export_does_not_know(small, tmp_path):
    class Stranger(type(small.linear.weight_quant)):
        pass

    small.linear.weight_quant.__class__ = Stranger
    both(small, tmp_path, r"'linear\.weight_quant' is quantized by a Stranger, which exports to")


def test_export_in_the_inference_mode(small, tmp_path):
    with torch.no_grad(), quant_inference_mode(small):
        small(samples(2), ONE)
        both(small, tmp_path, r"in quant_inference_mode\. Export it after that block")
    export_torch(small, (samples(2), ONE))


def test_export_with_quantizers_in_another_mode(small, tmp_path):
    next(tdq.named_quantizers(small))[1].mode = "dynamic"
    both(small, tmp_path, r"'conv\.input' is in mode 'dynamic'.*Set its mode to 'quantize'")


def test_export_of_another_rounding(tmp_path):
    activation = TDQInt8ActPerTensorFloat.let(
        tdq_estimator="brevitas", float_to_int_impl_type="floor"
    )
    model = with_scales(Parallel(activation))
    both(model, tmp_path, r"'conv\.input' has float_to_int_impl_type = 'floor'.*'round'")


def test_export_in_half_precision(small, tmp_path):
    both(small.half(), tmp_path, r"'conv\.weight' is torch\.float16.*Call model\.float\(\)")


def test_export_in_training_mode(small, tmp_path):
    both(small.train(), tmp_path, r"in training mode\. Call model\.eval\(\)")


def test_an_example_that_is_not_in_the_table(small):
    with pytest.raises(LookupRuleError, match=r"Timestep 7 is not in the frozen table"):
        export_torch(small, (samples(2), 7))


def test_export_without_a_timestep(small, tmp_path):
    with pytest.raises(TypeError, match="timestep"):
        export_onnx(small, tmp_path / "model.onnx", (samples(2),))
    with pytest.raises(TimestepError, match="without its timestep"):
        export_onnx(small, tmp_path / "model.onnx", (samples(2), None))


def test_unknown_format(small, tmp_path):
    with pytest.raises(ConfigError, match=r"format = 'onnx' is not one of qcdq, qonnx"):
        export_onnx(small, tmp_path / "model.onnx", (samples(2), ONE), format="onnx")


@pytest.mark.filterwarnings("ignore:ONNX opset version set to:UserWarning")
def test_exports_of_brevitas_name_ours(small):
    with pytest.raises(AdapterError, match=r"knows no TDQ activations.*adapters\.brevitas"):
        export_onnx_qcdq(small, args=(samples(2), ONE))
