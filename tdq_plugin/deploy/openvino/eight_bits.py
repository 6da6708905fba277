"""Every grid as a part of an 8-bit one, which is what OpenVINO's integer kernels know.

Its low-precision passes take quantizers of 256 and 255 levels; 16 are enough for convolutions, but
not for every matrix product, and behind others all layers run in float. A grid of fewer codes is
256 codes of the same step, with the values limited beforehand.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset13 as ops

from tdq_plugin.deploy.openvino.nodes import consumers, fake_quantizers, is_constant

__all__ = ["store_weights_as_int8", "widen_activations"]

_EIGHT_BITS = {256, 255}


class _Grid(NamedTuple):
    """The codes `first .. last` of a `FakeQuantize` and the step between their values."""

    first: npt.NDArray[np.float64]
    last: npt.NDArray[np.float64]
    step: npt.NDArray[np.float64]


def widen_activations(model: ov.Model) -> None:
    """Give activation quantizers of fewer bits 256 levels; in place, values unchanged."""
    for quantizer in list(fake_quantizers(model)):
        grid = _grid(quantizer)
        if quantizer.get_attributes()["levels"] in _EIGHT_BITS or grid is None:
            continue
        low, high = (grid.first * grid.step).min(), (grid.last * grid.step).max()
        clipped = ops.clamp(quantizer.input_value(0), float(low), float(high))
        # A symmetric grid stays one: kernels prefer it to a zero point.
        first = np.where(grid.first + grid.last <= 0, -128, grid.first)
        ends = [_constant(code * grid.step) for code in (first, first + 255)]
        wide = ops.fake_quantize(clipped, *ends, *ends, 256)
        wide.set_friendly_name(quantizer.get_friendly_name())
        _replace(quantizer, wide)
    model.validate_nodes_and_infer_types()


def store_weights_as_int8(model: ov.Model) -> None:
    """Make int8 constants of fake-quantized and of int4 weights; in place, values unchanged.

    A saved model takes a quarter of a float one's bytes. OpenVINO makes int4 constants of weights
    of 16 levels by itself, and runs matrix products with them in float.
    """
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize":
            _store_fake_quantized(node)
        elif node.get_type_name() == "Constant" and node.get_element_type() == ov.Type.i4:
            _replace(node, ops.constant(_unpacked(node)))
    model.validate_nodes_and_infer_types()


def _store_fake_quantized(quantizer: ov.Node) -> None:
    weight, grid = quantizer.input_value(0).get_node(), _grid(quantizer)
    if weight.get_type_name() != "Constant" or grid is None:
        return
    codes = np.round(weight.get_data() / grid.step - grid.first) + grid.first
    codes = codes.clip(grid.first, grid.last)
    if codes.min() >= -128 and codes.max() <= 127:
        integers = ops.convert(ops.constant(codes.astype(np.int8)), ov.Type.f32)
        _replace(quantizer, ops.multiply(integers, _constant(grid.step)))


def _unpacked(constant: ov.Node) -> ov.Tensor:
    """The values of an int4 constant as int8.

    By OpenVINO's own conversion: `openvino.helpers.unpack_data` takes the nibbles of a byte in the
    other order.
    """
    shape = constant.get_output_shape(0)
    packed, codes = ov.Tensor(constant.data, shape, ov.Type.i4), ov.Tensor(ov.Type.i8, shape)
    ops.convert(constant, ov.Type.i8).evaluate([codes], [packed])
    return codes


def _grid(quantizer: ov.Node) -> _Grid | None:
    """None unless the limits are constant, the same before and after, and hold zero as a code."""
    limits = quantizer.input_values()[1:]
    if not all(is_constant(limit) for limit in limits):
        return None
    low, high, *after = (_value(limit) for limit in limits)
    if not (np.array_equal(low, after[0]) and np.array_equal(high, after[1])):
        return None
    step = (high - low) / (quantizer.get_attributes()["levels"] - 1)
    first = np.round(low / step)
    if np.abs(first - low / step).max() > 1e-3:
        return None
    return _Grid(first, first + quantizer.get_attributes()["levels"] - 1, step)


def _value(output: ov.Output) -> npt.NDArray[np.float64]:
    data: npt.NDArray[np.float64] = output.get_node().get_data().astype(np.float64)
    return data


def _constant(value: npt.NDArray[np.float64]) -> ov.Node:
    return ops.constant(value.astype(np.float32))


def _replace(node: ov.Node, other: ov.Node) -> None:
    for reader in consumers(node.output(0)):
        reader.replace_source_output(other.output(0))
