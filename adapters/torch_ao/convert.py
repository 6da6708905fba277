"""From a frozen graph to torch.ao's reference form: integer codes and decomposed operators."""

import copy
from typing import cast

import torch
from torch import fx, nn
from torch.ao.quantization import quantize_fx

from tdq_plugin.adapters.torch_ao.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.adapters.torch_ao.qconfig import tdq_backend_config
from tdq_plugin.errors import AdapterError
from tdq_plugin.graph.compute import quantizer_nodes
from tdq_plugin.graph.decompose import decompose, require_convertible

__all__ = ["convert"]


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
        AdapterError: The model is not attached, not frozen or not float32, a quantizer is switched
            off, a layer pads by other values than zero, or this torch has no decomposed reference
            form.
    """
    require_convertible(prepared)
    to_reference = getattr(quantize_fx, "_convert_to_reference_decomposed_fx", None)
    if to_reference is None:
        raise AdapterError(
            f"torch {torch.__version__} has no decomposed reference form in torch.ao. "
            "Use a release that tdq-plugin supports, or tdq_plugin.lower_to_int8."
        )
    model = copy.deepcopy(prepared).eval()
    for path, module in model.named_modules():
        _check_layer(path, module)
    for node in quantizer_nodes(model.graph):
        decompose(model, node, _quantizer(model, node), mixed_timesteps)
    return cast(fx.GraphModule, to_reference(model, backend_config=tdq_backend_config()))


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
