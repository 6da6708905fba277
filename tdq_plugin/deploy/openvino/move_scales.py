"""The pass that brings constant quantizers next to their layers: `W (g q) + b = g (W q) + b`.

OpenVINO runs a layer on integers if its quantizer is constant and is its direct neighbour. The
ratio g of a timestep stands between them in a converted model; here it moves behind the product.
"""

import openvino as ov
from openvino import opset13 as ops

from tdq_plugin.deploy.openvino.commuting import is_layer_input, passes_through
from tdq_plugin.deploy.openvino.nodes import consumers, layer_name, sizes
from tdq_plugin.deploy.openvino.ratios import factor_in_front, find_rescaled_values

__all__ = ["move_scales"]


def move_scales(model: ov.Model) -> dict[str, list[str]]:
    """Move the ratio of every rescaled quantizer behind the layers that read it; in place.

    The value of every layer stays the same up to the rounding of one multiplication. Where a
    reader is no layer, the multiplication stays in front of it.

    Returns:
        By the quantizer's name, the readers that the scale stayed in front of; none of them, if it
        was moved entirely.
    """
    left: dict[str, list[str]] = {}
    for rescaled in list(find_rescaled_values(model)):
        _give_rank_to_factor(rescaled.value)
        name = layer_name(rescaled.value.get_node())
        left.setdefault(name, [])
        left[name] += _push(rescaled.value, rescaled.ratio, consumers(rescaled.product))
    model.validate_nodes_and_infer_types()
    return left


def _push(value: ov.Output, ratio: ov.Output, readers: list[ov.Input]) -> list[str]:
    """Let readers of `value * ratio` read `value`; returns those that need the product."""
    left = []
    for reader in readers:
        node = reader.get_node()
        if node.get_type_name() == "ShapeOf":
            reader.replace_source_output(value)
        elif is_layer_input(reader, ratio):
            _multiply_behind(reader, value, ratio)
        elif passes_through(reader, ratio):
            following = consumers(node.output(0))
            reader.replace_source_output(value)
            left += _push(node.output(0), ratio, following)
        else:
            reader.replace_source_output(_product(value, ratio))
            left.append(_described(node))
    return left


def _multiply_behind(reader: ov.Input, value: ov.Output, ratio: ov.Output) -> None:
    result = reader.get_node().output(0)
    following = consumers(result)
    reader.replace_source_output(value)
    product = _product(result, ratio)
    for reading in following:
        reading.replace_source_output(product)


def _product(value: ov.Output, ratio: ov.Output) -> ov.Output:
    return ops.multiply(value, _with_rank(ratio, len(sizes(value)))).output(0)


def _give_rank_to_factor(value: ov.Output) -> None:
    """Else OpenVINO would change the layout of x, there and back, for the multiplication."""
    factor = factor_in_front(value)
    if factor is not None:
        ranked = _with_rank(factor.get_source_output(), len(sizes(value)))
        factor.replace_source_output(ranked)


def _with_rank(ratio: ov.Output, rank: int) -> ov.Output:
    if len(sizes(ratio)) == rank:
        return ratio
    shape = ops.constant([-1, *[1] * (rank - 1)], ov.Type.i64)
    return ops.reshape(ratio, shape, special_zero=False).output(0)


def _described(node: ov.Node) -> str:
    path, kind = layer_name(node), node.get_type_name()
    return str(kind) if path == node.get_friendly_name() else f"{kind} in {path}"
