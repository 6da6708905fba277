"""Which operations a factor per sample can be moved across, exactly."""

import openvino as ov

from tdq_plugin.deploy.openvino.nodes import (
    CONVOLUTIONS,
    is_constant,
    is_single,
    sizes,
    static_size,
)

__all__ = ["is_layer_input", "passes_through"]

_LINEAR_MODES = {"nearest", "linear", "linear_onnx"}


def is_layer_input(reader: ov.Input, ratio: ov.Output) -> bool:
    """Whether a node multiplies what it reads here with a constant, sample by sample."""
    node, port = reader.get_node(), reader.get_index()
    if node.get_type_name() in CONVOLUTIONS:
        return bool(port == 0)
    if node.get_type_name() != "MatMul" or not is_constant(node.input_value(1 - port)):
        return False
    return is_single(ratio) or _keeps_batch_in_product(node, port)


def passes_through(reader: ov.Input, ratio: ov.Output) -> bool:
    """Whether a node only moves values, sums them with constant weights, or adds zeros."""
    node, port = reader.get_node(), reader.get_index()
    rule = {
        "Interpolate": _interpolates_linearly,
        "Pad": _pads_with_zeros,
        "Reshape": _always,
        "Transpose": _always,
    }.get(node.get_type_name())
    if port != 0 or rule is None or not rule(node):
        return False
    return is_single(ratio) or _keeps_batch(node)


def _always(node: ov.Node) -> bool:
    return True


def _interpolates_linearly(node: ov.Node) -> bool:
    return node.get_attributes()["mode"] in _LINEAR_MODES


def _pads_with_zeros(node: ov.Node) -> bool:
    if node.get_attributes()["pad_mode"] != "constant":
        return False
    # Without a value of its own, Pad takes zeros.
    return node.get_input_size() < 4 or _values(node, 3) == [0]


def _keeps_batch(node: ov.Node) -> bool:
    """Whether sample i of the input is sample i of the output."""
    if node.get_type_name() == "Transpose":
        order = _values(node, 1)
        return order is not None and order[:1] == [0]
    before, after = sizes(node.input_value(0)), sizes(node.output(0))
    if node.get_type_name() == "Reshape":
        # All dimensions but the batch are static in a converted model.
        rest = static_size(before[1:])
        return rest is not None and rest == static_size(after[1:])
    if node.get_type_name() == "Pad":
        ends = (_values(node, 1), _values(node, 2))
        return all(end is not None and end[0] == 0 for end in ends)
    # Interpolate's axes are its third input; other versions of the operation keep the ratio.
    is_known = node.get_type_info().version_id == "opset11" and node.get_input_size() == 3
    axes = _values(node, 2) if is_known else None
    return axes is not None and 0 not in axes


def _keeps_batch_in_product(node: ov.Node, port: int) -> bool:
    rank = len(sizes(node.input_value(port)))
    if rank != len(sizes(node.output(0))):
        return False
    return rank > 2 or (rank == 2 and port == 0 and not node.get_attributes()["transpose_a"])


def _values(node: ov.Node, port: int) -> list[float] | None:
    """The numbers of a constant input, None if it is computed."""
    source = node.input_value(port).get_node()
    if source.get_type_name() != "Constant":
        return None
    return [float(value) for value in source.get_data().reshape(-1)]
