"""Grids of any number of bits on OpenVINO's 8-bit kernels, value by value."""

import numpy as np
import openvino as ov
import pytest
from cpu import needs_vnni
from openvino import opset13 as ops

from tdq_plugin import activation_grid, weight_grid
from tdq_plugin.deploy.openvino.eight_bits import store_weights_as_int8, widen_activations
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES, integer_layers

GRIDS = [activation_grid(bits, symmetric) for bits in range(2, 9) for symmetric in (False, True)]
STEP = np.float32(0.0371)


def constant(value, dtype=np.float32):
    return ops.constant(np.asarray(value, dtype=dtype))


def quantizer(x, grid, zero_point, step=STEP):
    ends = [constant((code - zero_point) * step) for code in (grid.quant_min, grid.quant_max)]
    return ops.fake_quantize(x, *ends, *ends, grid.quant_max - grid.quant_min + 1)


def compiled(model):
    network = ov.Core().compile_model(model, "CPU", DEFAULT_PROPERTIES)
    return lambda x: network([x])[0]


def layer_on(grid, zero_point):
    x = ops.parameter((1, 8, 6, 6), np.float32)
    weight = np.random.default_rng(0).integers(-127, 128, (4, 8, 3, 3))
    integers = ops.convert(constant(weight, np.int8), ov.Type.f32)
    padding = [[1, 1]] * 4
    conv = ops.convolution(
        quantizer(x, grid, zero_point), ops.multiply(integers, constant(0.01)), *padding
    )
    conv.set_friendly_name("conv")
    return ov.Model([conv], [x])


@needs_vnni
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_every_grid_runs_on_integers_with_the_same_values(grid):
    zero_point = 0 if grid.symmetric else grid.quant_max // 3
    model = layer_on(grid, zero_point)
    wide = model.clone()
    widen_activations(wide)
    codes = np.random.default_rng(1).uniform(grid.quant_min - 3, grid.quant_max + 3, (1, 8, 6, 6))
    codes = np.round(codes) + 0.3 * np.sin(np.arange(288)).reshape(codes.shape)
    x = ((codes - zero_point) * STEP).astype(np.float32)
    np.testing.assert_allclose(compiled(wide)(x), compiled(model)(x), rtol=1e-5, atol=1e-5)
    assert integer_layers(wide, DEFAULT_PROPERTIES) == {"conv"}
    if grid.bits not in (4, 8):
        assert integer_layers(model, DEFAULT_PROPERTIES) == set()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("narrow", [True, False])
def test_weights_are_stored_as_int8(bits, narrow):
    grid, random = weight_grid(bits), np.random.default_rng(0)
    low = grid.quant_min + narrow
    weight = constant(100 * random.standard_normal((5, 4)))
    step = random.uniform(0.01, 0.5, (5, 1)).astype(np.float32)
    ends = [constant(code * step) for code in (low, grid.quant_max)]
    quantized = ops.fake_quantize(weight, *ends, *ends, grid.quant_max - low + 1)
    x = ops.parameter((4, 4), np.float32)
    model = ov.Model([ops.matmul(x, quantized, False, True)], [x])
    stored = model.clone()
    store_weights_as_int8(stored)
    identity = np.eye(4, dtype=np.float32)
    ours, theirs = compiled(stored)(identity), compiled(model)(identity)
    np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=1e-5)
    assert not [node for node in stored.get_ops() if node.get_type_name() == "FakeQuantize"]
    (codes,) = (n for n in stored.get_ops() if n.get_element_type() == ov.Type.i8)
    assert codes.get_data().min() == low


@pytest.mark.parametrize(
    "ends",
    [
        ((-1.0, 1.0), (-2.0, 2.0)),  # another range afterwards
        ((0.1, 1.0), (0.1, 1.0)),  # zero is no code
        ((0.0, 25.5), (0.0, 25.5)),  # 255 codes above zero
    ],
)
def test_other_quantizers_of_weights_stay(ends):
    weight = constant(np.linspace(-1, 30, 20).reshape(5, 4))
    limits = [constant(end) for pair in ends for end in pair]
    x = ops.parameter((4, 4), np.float32)
    quantized = ops.fake_quantize(weight, *limits, 256)
    model = ov.Model([ops.matmul(x, quantized, False, True)], [x])
    store_weights_as_int8(model)
    assert [node for node in model.get_ops() if node.get_type_name() == "FakeQuantize"]


def test_a_float_product_with_int8_weights_is_no_integer_layer():
    x = ops.parameter((2, 64), np.float32)
    codes = np.random.default_rng(0).integers(-127, 128, (64, 64))
    weight = ops.multiply(ops.convert(constant(codes, np.int8), ov.Type.f32), constant(0.01))
    product = ops.matmul(x, weight, False, True)
    assert integer_layers(ov.Model([product], [x]), DEFAULT_PROPERTIES) == set()


@needs_vnni
def test_int4_weights_become_int8_with_the_same_values():
    packed = np.random.default_rng(0).integers(0, 256, 18, dtype=np.uint8)
    codes = ops.constant(ov.Tensor(packed, [4, 9], ov.Type.i4))
    weight = ops.multiply(ops.convert(codes, ov.Type.f32), constant(0.5))
    x = ops.parameter((9, 9), np.float32)
    model = ov.Model([ops.matmul(x, weight, False, True)], [x])
    stored = model.clone()
    store_weights_as_int8(stored)
    assert ov.Type.i4 not in {node.get_element_type() for node in stored.get_ops()}
    identity = np.eye(9, dtype=np.float32)
    np.testing.assert_array_equal(compiled(stored)(identity), compiled(model)(identity))
    low_nibble = np.int8(packed[0] << 4) >> 4
    assert compiled(stored)(identity)[0, 0] == low_nibble / 2
