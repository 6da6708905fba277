"""From an int8 graph to one that OpenVINO converts: same edges, other modules."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from tdq_plugin.deploy.activations import DynamicCodes, DynamicValues, TableCodes, TableValues
from tdq_plugin.deploy.layers import Int8Layer
from tdq_plugin.deploy.lookup import TimestepLookup
from tdq_plugin.deploy.lower import LOOKUP
from tdq_plugin.deploy.openvino.modules import IntegerWeightLayer, RatioLookup, RescaledQuantizer
from tdq_plugin.errors import AdapterError, LookupRuleError, ScaleError
from tdq_plugin.graph.timestep_node import find_timestep_node
from tdq_plugin.scales.frozen import FrozenBank

__all__ = ["check_bank", "rewrite", "table_of"]


def rewrite(lowered: fx.GraphModule, inputs: Mapping[str, Tensor]) -> fx.GraphModule:
    """Exchange the modules of an int8 graph for those of `tdq_plugin.deploy.openvino.modules`.

    Args:
        lowered: From `lower_to_int8` or `load_int8`, with a table that `check_bank` accepts; it
            stays as it is.
        inputs: One call by argument name, the timestep float32 of shape `(B,)`.

    Returns:
        A graph of plain torch operations. It cannot tell a timestep that is not in the table.
    """
    model = copy.deepcopy(lowered)
    lookup = model.get_submodule(LOOKUP)
    assert isinstance(lookup, TimestepLookup)
    ratios = RatioLookup(lookup.bank, lookup.values)
    _exchange_quantizers(model, lookup.bank, ratios.base_scale, _batch_is_leading(model, inputs))
    for path, module in list(model.named_modules()):
        if isinstance(module, Int8Layer):
            model.set_submodule(path, IntegerWeightLayer(module))
    model.set_submodule(LOOKUP, ratios)
    _read_timestep_as_it_is(model)
    return model


def table_of(lowered: fx.GraphModule) -> FrozenBank:
    """The scale table of an int8 graph.

    Raises:
        AdapterError: Its activations are dynamic.
    """
    lookup = getattr(lowered, LOOKUP, None)
    is_dynamic = any(isinstance(m, DynamicCodes | DynamicValues) for m in lowered.modules())
    if is_dynamic or not isinstance(lookup, TimestepLookup):
        raise AdapterError(
            "A model with dynamic activations has no scale table, and OpenVINO's quantizers are "
            "constant. Call lower_to_int8 with activations='table'."
        )
    return lookup.bank


def check_bank(bank: FrozenBank) -> None:
    """Whether constant quantizers can stand for a table.

    Raises:
        LookupRuleError: The table interpolates.
        ScaleError: Its zero points move with t.
    """
    if bank.lookup == "linear":
        raise LookupRuleError(
            "OpenVINO models read rows of the table, they cannot interpolate (lookup='linear'). "
            "Freeze with the timesteps that the sampler visits, or with lookup='nearest'."
        )
    if bank.zero_points.shape[0] > 1:
        moving = (bank.zero_points != bank.zero_points[:1]).any(dim=0).tolist()
        names = [name for name, moves in zip(bank.names, moving, strict=True) if moves]
        raise ScaleError(
            f"The zero points of {len(names)} quantizers move with t (first: {names[:3]}), which "
            "OpenVINO's constant quantizers cannot follow. Train with timestep_zero_point=False, "
            "or use lower_to_int8."
        )


def _batch_is_leading(model: fx.GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, bool]:
    """Whether dimension 0 of each quantizer's input is the batch, by the quantizer's path."""
    sizes: dict[str, int] = {}
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, TableCodes | TableValues):

            def note(_: object, args: tuple[Tensor, object], path: str = path) -> None:
                sizes[path] = args[0].shape[0]

            handles.append(module.register_forward_pre_hook(note))
    with torch.no_grad():
        model(**inputs)
    for handle in handles:
        handle.remove()
    batch = next(iter(inputs.values())).shape[0]
    return {path: size == batch for path, size in sizes.items()}


def _exchange_quantizers(
    model: fx.GraphModule, bank: FrozenBank, base_scale: Tensor, batch_is_leading: dict[str, bool]
) -> None:
    for node in model.graph.find_nodes(op="call_module"):
        path = str(node.target)
        if path in batch_is_leading:
            row = node.args[1].args[1]
            scales = bank.scales[:, row]
            quantizer = RescaledQuantizer(
                bank.names[row],
                bank.grids[row],
                base_scale[row].item(),
                int(bank.zero_points[0, row]),
                is_static=bool((scales == scales[0]).all()),
                batch_is_leading=batch_is_leading[path],
            )
            model.set_submodule(path, quantizer)


def _read_timestep_as_it_is(model: fx.GraphModule) -> None:
    """The input is float32 of shape `(N,)` already; the checks of its form cannot be traced."""
    timesteps = find_timestep_node(model.graph)
    assert timesteps is not None
    timestep = timesteps.args[0]
    assert isinstance(timestep, fx.Node)
    timesteps.replace_all_uses_with(timestep)
    model.graph.erase_node(timesteps)
    model.graph.eliminate_dead_code()
    model.delete_all_unused_submodules()
    model.recompile()
