"""The pass that moves a factor behind layers: which operations it looks through, and exactly."""

import numpy as np
import openvino as ov
import pytest
from cpu import needs_vnni
from openvino import opset13 as ops

from tdq_plugin.deploy.openvino.move_scales import move_scales
from tdq_plugin.deploy.openvino.nodes import CONVOLUTIONS
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES, integer_layers
from tdq_plugin.deploy.openvino.ratios import find_rescaled_values, static_reference

RANDOM = np.random.default_rng(0)
SHAPE = (-1, 4, 6, 6)


def constant(*shape):
    return ops.constant(RANDOM.standard_normal(shape).astype(np.float32))


def scalar(value):
    return ops.constant(np.float32(value))


def integers(*values):
    return ops.constant(np.array(values, dtype=np.int64))


def convolution(x, name="conv", channels=4):
    conv = ops.convolution(x, constant(3, channels, 3, 3), [1, 1], [1, 1], [1, 1], [1, 1])
    conv.set_friendly_name(name)
    return ops.add(conv, constant(1, 3, 1, 1))


def transposed(x, groups=1):
    strides, padding = [2, 2], [1, 1]
    if groups == 1:
        return ops.convolution_backprop_data(
            x, constant(4, 3, 3, 3), strides, None, padding, padding, [1, 1]
        )
    kernel = constant(groups, 4 // groups, 3, 3, 3)
    return ops.group_convolution_backprop_data(x, kernel, strides, None, padding, padding, [1, 1])


def product(x, width=6, **options):
    node = ops.matmul(x, constant(5, width), False, True, **options)
    node.set_friendly_name("matmul")
    return node


def build(following, ratio_shape=(-1, 1, 1, 1), shape=SHAPE, ends=(-1.0, 1.55)):
    """`following` of `ratio * FakeQuantize(x / ratio)`, as a model of x and the ratio."""
    x, ratio = (ops.parameter(s, np.float32) for s in (shape, ratio_shape))
    limits = [scalar(end) for end in ends] * 2
    quantized = ops.fake_quantize(ops.divide(x, ratio), *limits, 256)
    quantized.set_friendly_name("quantizer")
    outputs = following(ops.multiply(quantized, ratio))
    return ov.Model(outputs if isinstance(outputs, list) else [outputs], [x, ratio])


def runner(model):
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda *inputs: list(compiled(inputs).values())


def check_same_values(model, moved, ratio_shape=(-1, 1, 1, 1), shape=SHAPE):
    before, after = runner(model), runner(moved)
    for batch in (1, 3):
        x = RANDOM.standard_normal((batch, *shape[1:])).astype(np.float32)
        rows = batch if ratio_shape[:1] == (-1,) else 1
        ratio = np.linspace(0.5, 2, rows).reshape((rows, *ratio_shape[1:])).astype(np.float32)
        ratio = ratio.reshape([batch if s == -1 else s for s in ratio_shape])
        for expected, ours in zip(before(x, ratio), after(x, ratio), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)
        assert np.abs(after(x, 2 * ratio)[0] - before(x, ratio)[0]).max() > 0.01


def multiplications_before(model, kind):
    """How many nodes of a kind read a product."""
    nodes = [node for node in model.get_ops() if node.get_type_name() == kind]
    return sum(n.input_value(0).get_node().get_type_name() == "Multiply" for n in nodes)


def operands_have_one_rank(model):
    """OpenVINO changes the layout of the larger operand otherwise, which takes 3 % of a UNet."""
    nodes = [n for n in model.get_ops() if n.get_type_name() in ("Multiply", "Divide")]
    return all(len({len(v.get_partial_shape()) for v in n.input_values()}) == 1 for n in nodes)


def reshaped(x, *shape):
    return ops.reshape(x, integers(*shape), False)


def interpolated(x, mode, axes=(2, 3)):
    return ops.interpolate(x, integers(9, 9), mode, "sizes", axes=integers(*axes))


THROUGH = {
    "directly": convolution,
    "zero pad": lambda x: convolution(
        ops.pad(x, integers(0, 0, 0, 1), integers(0, 0, 1, 2), "constant", scalar(0))
    ),
    "nearest": lambda x: convolution(interpolated(x, "nearest")),
    "linear": lambda x: convolution(interpolated(x, "linear_onnx")),
    "tokens": lambda x: product(ops.transpose(reshaped(x, -1, 4, 36), integers(0, 2, 1)), width=4),
    "matmul": product,
    "transposed": transposed,
    "grouped, transposed": lambda x: transposed(x, groups=2),
    "constant first": lambda x: ops.matmul(constant(5, 6), x, False, False),
    "two readers": lambda x: [convolution(x, "a"), convolution(interpolated(x, "nearest"), "b")],
    "two layers": lambda x: convolution(convolution(x, "a"), "b", channels=3),
    "its shape": lambda x: [convolution(x), ops.shape_of(x)],
}


@pytest.mark.parametrize("name", THROUGH)
@pytest.mark.parametrize("ratio_shape", [(-1, 1, 1, 1), (1,), ()])
def test_the_ratio_moves_behind_layers(name, ratio_shape):
    model = build(THROUGH[name], ratio_shape)
    moved = model.clone()
    assert move_scales(moved) == {"quantizer": []}
    assert not list(find_rescaled_values(moved))
    for kind in (*CONVOLUTIONS, "MatMul"):
        assert multiplications_before(moved, kind) == 0
    assert operands_have_one_rank(moved)
    check_same_values(model, moved, ratio_shape)


@needs_vnni
def test_a_transposed_convolution_keeps_its_integer_kernel():
    shape = (1, 32, 8, 8)

    def up(x):
        codes = ops.constant(RANDOM.integers(-127, 128, (32, 32, 2, 2)).astype(np.int8))
        weight = ops.multiply(ops.convert(codes, ov.Type.f32), scalar(0.01))
        node = ops.convolution_backprop_data(x, weight, [2, 2], None, [0, 0], [0, 0], [1, 1])
        node.set_friendly_name("up")
        return ops.add(node, constant(1, 32, 1, 1))

    model = build(up, (1, 1, 1, 1), shape, ends=(-1.28, 1.27))
    moved = model.clone()
    assert move_scales(moved) == {"quantizer": []}
    assert integer_layers(static_reference(model), DEFAULT_PROPERTIES) == {"up"}
    assert integer_layers(moved, DEFAULT_PROPERTIES) == {"up"}
    assert integer_layers(model, DEFAULT_PROPERTIES) == set()


STAYS = {
    "pad with ones": lambda x: convolution(
        ops.pad(x, integers(0, 0, 1, 1), integers(0, 0, 1, 1), "constant", scalar(1))
    ),
    "pad with the edge": lambda x: convolution(
        ops.pad(x, integers(0, 0, 1, 1), integers(0, 0, 1, 1), "edge")
    ),
    "cubic": lambda x: convolution(interpolated(x, "cubic")),
    "slice": lambda x: convolution(
        ops.slice(x, integers(0), integers(5), integers(1), integers(2))
    ),
    "activation": lambda x: convolution(ops.relu(x)),
    "two activations": lambda x: ops.matmul(x, x, False, True),
}


@pytest.mark.parametrize("name", STAYS)
@pytest.mark.parametrize("ratio_shape", [(-1, 1, 1, 1), ()])
def test_the_ratio_stays_in_front_of_everything_else(name, ratio_shape):
    model = build(STAYS[name], ratio_shape)
    moved = model.clone()
    left = move_scales(moved)["quantizer"]
    assert len(left) == (2 if name == "two activations" else 1)
    assert len(list(find_rescaled_values(moved))) > 0
    check_same_values(model, moved, ratio_shape)


MIXES_SAMPLES = {
    "reshape": lambda x: product(reshaped(x, -1, 6)),
    "transpose": lambda x: product(ops.transpose(x, integers(1, 0, 2, 3))),
    "pad": lambda x: convolution(
        ops.pad(x, integers(1, 0, 0, 0), integers(0, 0, 0, 0), "constant", scalar(0))
    ),
    "interpolate": lambda x: convolution(interpolated(x, "nearest", axes=(0, 2))),
}


@pytest.mark.parametrize("name", MIXES_SAMPLES)
def test_a_ratio_per_sample_stays_where_samples_are_mixed(name):
    model = build(MIXES_SAMPLES[name])
    moved = model.clone()
    assert len(move_scales(moved)["quantizer"]) == 1
    check_same_values(model, moved)
    single = build(MIXES_SAMPLES[name], (1, 1, 1, 1))
    moved = single.clone()
    assert move_scales(moved) == {"quantizer": []}
    check_same_values(single, moved, (1, 1, 1, 1))


@pytest.mark.parametrize(
    ("following", "left"),
    [
        (lambda x: ops.matmul(x, constant(6, 5), False, False), 0),
        (lambda x: ops.matmul(constant(5, 6), x, False, True), 1),
    ],
)
def test_a_ratio_per_sample_cannot_leave_a_sum_over_samples(following, left):
    model = build(following, (-1, 1), (-1, 6))
    moved = model.clone()
    assert len(move_scales(moved)["quantizer"]) == left
    check_same_values(model, moved, (-1, 1), (-1, 6))


def test_a_layer_and_another_reader():
    model = build(lambda x: [convolution(x), ops.relu(x)])
    moved = model.clone()
    assert move_scales(moved) == {"quantizer": ["Relu"]}
    assert multiplications_before(moved, "Convolution") == 0
    check_same_values(model, moved)


def test_a_factor_per_channel_is_no_ratio():
    model = build(convolution, (-1, 4, 1, 1))
    assert move_scales(model) == {}


@pytest.mark.parametrize("divided", [True, False])
def test_the_static_reference_has_no_ratio(divided):
    x, ratio = (ops.parameter(shape, np.float32) for shape in (SHAPE, (-1, 1, 1, 1)))
    ends = [scalar(end) for end in (-1.0, 1.55)] * 2
    reciprocal = ops.divide(scalar(1), ratio)
    inside = ops.divide(x, ratio) if divided else ops.multiply(reciprocal, x)
    quantized = ops.fake_quantize(inside, *ends, 256)
    model = ov.Model([convolution(ops.multiply(ratio, quantized))], [x, ratio])
    reference = static_reference(model)
    values = RANDOM.standard_normal((2, *SHAPE[1:])).astype(np.float32)
    ones, twos = (np.full((2, 1, 1, 1), value, dtype=np.float32) for value in (1, 2))
    expected = runner(model)(values, ones)[0]
    ours = runner(reference)(values, twos)[0]
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)
    assert np.abs(runner(model)(values, twos)[0] - expected).max() > 0.01
