"""From a frozen graph to torchao's converted form."""

import copy
from typing import cast

from torch import fx
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

from tdq_plugin.adapters.pt2e.fake_quantize import TDQWeightFakeQuantize
from tdq_plugin.adapters.pt2e.fold import fold_scale
from tdq_plugin.errors import AdapterError
from tdq_plugin.graph.compute import quantizer_nodes
from tdq_plugin.graph.decompose import decompose, require_convertible
from tdq_plugin.quantizer import ActivationQuantizer

__all__ = ["convert"]


def convert(
    prepared: fx.GraphModule, *, mixed_timesteps: bool = False, fold_scales: bool = False
) -> fx.GraphModule:
    """`convert_pt2e` for a frozen model, in evaluation mode; it stays as it is.

    Every activation quantizer becomes a pair of `quantized_decomposed` operators whose scale is
    looked up in the table by the timestep. Weights are stored as int8 codes.

    Args:
        prepared: An attached model after `tdq_plugin.freeze`.
        mixed_timesteps: Quantize along the batch, so that each sample may have its own timestep.
            Else a call has one timestep, given as a number or a tensor of one element, and the
            operators are those per tensor, which backends know best.
        fold_scales: Divide by the scale before and multiply after each layer; the operators then
            have constant parameters, which Inductor and other backends take for static
            quantization. Serves mixed timesteps, too; zero points must be constant over t.

    Returns:
        A new graph; `torch.export.export` takes it.

    Raises:
        AdapterError: The model is not attached, not frozen or not float32, a quantizer is switched
            off, or a zero point that depends on t shall be folded.
    """
    require_convertible(prepared)
    model = copy.deepcopy(prepared).eval()
    for path, module in model.named_modules():
        if isinstance(module, TDQWeightFakeQuantize) and not module.enabled:
            raise AdapterError(
                f"The weight quantizer {path!r} is switched off, so the converted graph would "
                "differ from the model. Switch it on (enable_fake_quant)."
            )
    for node in quantizer_nodes(model.graph):
        quantizer = cast(ActivationQuantizer, model.get_submodule(str(node.target)))
        if fold_scales:
            fold_scale(model, node, quantizer)
        else:
            decompose(model, node, quantizer, mixed_timesteps)
    return _without_float_weights(convert_pt2e(model))


def _without_float_weights(model: fx.GraphModule) -> fx.GraphModule:
    """Without the weights that the codes were made from, which torchao leaves in submodules."""
    used = {str(node.target) for node in model.graph.find_nodes(op="get_attr")}
    called = {f"{node.target}." for node in model.graph.find_nodes(op="call_module")}
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if name not in used and not name.startswith(tuple(called)):
            owner, _, attribute = name.rpartition(".")
            delattr(model.get_submodule(owner), attribute)
    return model
