"""Scales behind the layers: backends then see static quantization, whatever the timestep."""

from typing import Any

import torch
from torch import Tensor, fx

from tdq_plugin.adapters.pt2e.operators import is_layer, operand_indices
from tdq_plugin.errors import AdapterError
from tdq_plugin.fake_quantize import per_sample
from tdq_plugin.freeze import frozen_bank
from tdq_plugin.quantizer import ActivationQuantizer

__all__ = ["fold_scale"]

_OPERATORS = torch.ops.quantized_decomposed


def fold_scale(model: fx.GraphModule, node: fx.Node, quantizer: ActivationQuantizer) -> None:
    """Replace a quantizer by one of scale 1, between a division and a multiplication; in place.

    `W Q(x; s) + b = s W Q(x / s; 1) + b`: the product is that of integers with constant
    parameters, so a backend that knows static quantization needs to know nothing of t.

    Args:
        model: The frozen graph.
        node: The quantizer's node, with arguments `(x, scale, zero_point)`.
        quantizer: The module that the node calls.

    Raises:
        AdapterError: The zero point depends on t, or the quantizer is switched off.
    """
    quantizer.require_quantizing("converted graph")
    x, scale, _ = node.args
    graph, grid = model.graph, quantizer.grid
    parameters = (1.0, _constant_zero_point(model, quantizer), grid.quant_min, grid.quant_max)
    with graph.inserting_before(node):
        divided = graph.call_function(divide, (x, scale))
        dtype = torch.int8 if grid.signed else torch.uint8
        codes = graph.call_function(
            _OPERATORS.quantize_per_tensor.default, (divided, *parameters, dtype)
        )
        steps = graph.call_function(
            _OPERATORS.dequantize_per_tensor.default, (codes, *parameters, dtype)
        )
    for user in list(node.users):
        if is_layer(user):
            _multiply_after(graph, user, scale)
        elif operand_indices(user):
            with graph.inserting_before(user):
                restored = graph.call_function(multiply, (steps, scale))
            user.replace_input_with(node, restored)
        user.replace_input_with(node, steps)
    graph.erase_node(node)


def divide(x: Tensor, scale: Tensor) -> Tensor:
    """`x` in steps of its scale `()` or `(B,)`, as the fake quantization computes it."""
    return x * (1 / per_sample(scale, x))


def multiply(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x * scale + bias`; the scale `()` or `(B,)` along dimension 0."""
    product = x * per_sample(scale, x)
    return product if bias is None else product + bias


def _multiply_after(graph: fx.Graph, layer: fx.Node, scale: Any) -> None:
    bias = layer.args[2] if len(layer.args) > 2 else None
    layer.args = (*layer.args[:2], None, *layer.args[3:])
    with graph.inserting_after(layer):
        restored = graph.call_function(multiply, (layer, scale, bias))
    layer.replace_all_uses_with(restored, lambda user: user is not restored)
    if isinstance(bias, fx.Node) and layer.target is not torch.ops.aten.linear.default:
        # One value for each channel, which is not the last dimension of a convolution.
        with graph.inserting_before(restored):
            dimensions = 1 if "conv1d" in str(layer.target) else 2
            shaped = graph.call_method("reshape", (bias, (-1, *[1] * dimensions)))
        restored.replace_input_with(bias, shaped)


def _constant_zero_point(model: fx.GraphModule, quantizer: ActivationQuantizer) -> int:
    bank = frozen_bank(model, "a converted graph")
    assert quantizer.name is not None
    zero_points = bank.zero_points[:, bank.names.index(quantizer.name)]
    if bool((zero_points != zero_points[0]).any()):
        raise AdapterError(
            f"The zero point of {quantizer.name!r} depends on the timestep, and only scales can be "
            "moved behind a layer. Convert with fold_scales=False."
        )
    return int(zero_points[0])
