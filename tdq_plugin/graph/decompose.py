"""A quantizer's node becomes the frameworks' operators, its scale looked up by the timestep."""

from typing import Any

import torch
from torch import Tensor, fx, nn

from tdq_plugin.errors import ScaleError
from tdq_plugin.float32 import require_float32
from tdq_plugin.freeze import frozen_bank
from tdq_plugin.quantizer import ActivationQuantizer

__all__ = ["decompose", "require_convertible"]

# They are registered by the framework that converts.
_OPERATORS = torch.ops.quantized_decomposed


def decompose(
    model: fx.GraphModule,
    node: fx.Node,
    quantizer: ActivationQuantizer,
    mixed_timesteps: bool = False,
) -> None:
    """Replace one activation quantizer's node by quantize and dequantize operators.

    Args:
        model: The frozen graph; changed in place.
        node: The quantizer's node, with arguments `(x, scale, zero_point)`.
        quantizer: The module that the node calls.
        mixed_timesteps: As for `convert`.

    Raises:
        AdapterError: The model is not frozen or not float32, or the quantizer is switched off.
    """
    require_convertible(model)
    quantizer.require_quantizing("converted graph")
    grid, graph = quantizer.grid, model.graph
    dtype = torch.int8 if grid.signed else torch.uint8
    codes: tuple[Any, ...] = (grid.quant_min, grid.quant_max, dtype)
    x, *rows = node.args
    with graph.inserting_before(node):
        if mixed_timesteps:
            quantize = _OPERATORS.quantize_per_channel.default
            dequantize = _OPERATORS.dequantize_per_channel.default
            scale, zero_point = (graph.call_function(along_batch, (row, x)) for row in rows)
            codes = (0, *codes)
        else:
            quantize = _OPERATORS.quantize_per_tensor.tensor
            dequantize = _OPERATORS.dequantize_per_tensor.tensor
            scale, zero_point = (graph.call_function(one_value, (row,)) for row in rows)
        parameters = (scale, graph.call_method("long", (zero_point,)), *codes)
        integers = graph.call_function(quantize, (x, *parameters))
        output = graph.call_function(dequantize, (integers, *parameters))
    node.replace_all_uses_with(output)
    graph.erase_node(node)


def one_value(row: Tensor) -> Tensor:
    """The scale of a call with one timestep, shape `()`.

    Raises:
        ScaleError: The call has several timesteps.
    """
    if row.numel() != 1:
        raise ScaleError(
            f"The converted graph was called with {row.numel()} timesteps, and it takes one a "
            "call. Pass the timestep as a number, or convert with mixed_timesteps=True."
        )
    return row.reshape(())


def along_batch(row: Tensor, x: Tensor) -> Tensor:
    """A scale for each index of dimension 0 of `x`, batch-major.

    Raises:
        ScaleError: The number of scales does not divide the leading dimension.
    """
    repeats, rest = divmod(x.shape[0], row.shape[0])
    if rest or repeats == 0:
        raise ScaleError(
            f"{row.shape[0]} scales cannot be spread over a leading dimension of {x.shape[0]}. "
            "Samples must lie along dimension 0, batch-major."
        )
    return row.repeat_interleave(repeats)


def require_convertible(model: nn.Module) -> None:
    """Check that a model's bank is a table, and its parameters float32.

    Raises:
        AdapterError: It is not attached, not frozen, or of another precision.
    """
    frozen_bank(model, "a converted graph")
    require_float32(model, "converted graph")
