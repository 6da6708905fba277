"""From a frozen graph to torch.ao's reference form: integer codes and decomposed operators."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.ao.quantization import quantize_fx

from tdq_plugin.adapters.torch_ao.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.adapters.torch_ao.qconfig import tdq_backend_config
from tdq_plugin.attach import scale_bank
from tdq_plugin.errors import AdapterError, ScaleError
from tdq_plugin.graph.compute import is_quantizer
from tdq_plugin.scales.frozen import FrozenBank

__all__ = ["convert", "decompose"]

_OPERATORS = torch.ops.quantized_decomposed


def convert(prepared: fx.GraphModule, *, mixed_timesteps: bool = False) -> fx.GraphModule:
    """Convert a frozen model to the reference graph that integer backends read.

    Every activation quantizer becomes a pair of `quantized_decomposed` operators whose scale is
    looked up in the table by the timestep; convolutions and linear layers become torch.ao's
    reference modules. The outputs equal those of the model in evaluation mode bit for bit, in
    float32.

    Args:
        prepared: An attached model after `tdq_plugin.freeze`; it stays as it is.
        mixed_timesteps: Quantize along the batch, so that each sample may have its own timestep.
            Else a call has one timestep, given as a number or a tensor of one element, and the
            operators are those per tensor, which backends know best.

    Returns:
        A new graph; `torch.export.export` takes it.

    Raises:
        AdapterError: The model is not attached or not frozen, a quantizer is switched off, a
            layer pads by other values than zero, or this torch has no decomposed reference form.
    """
    _require_frozen(prepared)
    to_reference = getattr(quantize_fx, "_convert_to_reference_decomposed_fx", None)
    if to_reference is None:
        raise AdapterError(
            f"torch {torch.__version__} has no decomposed reference form in torch.ao. "
            "Use a release that tdq-plugin supports, or tdq_plugin.lower_to_int8."
        )
    model = copy.deepcopy(prepared).eval()
    for path, module in model.named_modules():
        _check_layer(path, module)
    for node in list(model.graph.nodes):
        if is_quantizer(node):
            decompose(model, node, _quantizer(model, node), mixed_timesteps)
    return cast(fx.GraphModule, to_reference(model, backend_config=tdq_backend_config()))


def decompose(
    model: fx.GraphModule,
    node: fx.Node,
    quantizer: TDQFakeQuantize,
    mixed_timesteps: bool = False,
) -> None:
    """Replace one activation quantizer's node by quantize and dequantize operators.

    Args:
        model: The frozen graph; changed in place.
        node: The quantizer's node, with arguments `(x, scale, zero_point)`.
        quantizer: The module that the node calls.
        mixed_timesteps: As for `convert`.

    Raises:
        AdapterError: The model is not frozen, or the quantizer is switched off.
    """
    _require_frozen(model)
    if quantizer.mode != "quantize":
        raise AdapterError(
            f"The quantizer {node.target!r} is in mode {quantizer.mode!r}, so the converted graph "
            "would differ from the model. Set its mode to 'quantize'."
        )
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


def _require_frozen(model: nn.Module) -> None:
    bank = scale_bank(model)
    if not isinstance(bank, FrozenBank):
        raise AdapterError(
            f"The model's bank is a {type(bank).__name__}; a converted graph holds a table. "
            "Call tdq_plugin.freeze(model, timesteps) first."
        )


def _check_layer(path: str, module: nn.Module) -> None:
    weights = getattr(module, "weight_fake_quant", None)
    if isinstance(weights, TDQWeightFakeQuantize) and not weights.enabled:
        raise AdapterError(
            f"The weight quantizer of {path!r} is switched off, so the converted graph would "
            "differ from the model. Switch it on (enable_fake_quant)."
        )
    # torch.ao's reference convolutions pad by zeros whatever the mode.
    if getattr(module, "padding_mode", "zeros") != "zeros" and getattr(module, "qconfig", None):
        raise AdapterError(
            f"{path!r} pads by {module.padding_mode!r}, which torch.ao's reference form does not "
            "know. Leave the layer float: float_layers=[...]."
        )


def _quantizer(model: fx.GraphModule, node: fx.Node) -> TDQFakeQuantize:
    return cast(TDQFakeQuantize, model.get_submodule(str(node.target)))
