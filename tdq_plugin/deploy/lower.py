"""`lower_to_int8`: a frozen graph, with its layers on integer kernels."""

import copy
import operator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import fx, nn

from tdq_plugin.deploy.activations import (
    DynamicCodes,
    DynamicValues,
    TableCodes,
    TableValues,
    uint8_shift,
)
from tdq_plugin.deploy.lookup import TimestepLookup
from tdq_plugin.deploy.placement import Operand, quantized_operands, quantizer_nodes
from tdq_plugin.deploy.timestep_values import boundary_nodes, tabulate
from tdq_plugin.deploy.weights import (
    float_layer,
    has_integer_kernel,
    int8_layer,
    weight_quantizer,
)
from tdq_plugin.errors import AdapterError, LookupRuleError
from tdq_plugin.freeze import frozen_bank
from tdq_plugin.graph.compute import is_layer
from tdq_plugin.graph.timestep_node import find_timestep_node, timestep_input
from tdq_plugin.graph.timestep_path import Source, sample_input, sources
from tdq_plugin.options import check_option
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.scales.frozen import FrozenBank
from tdq_plugin.weights import WeightQuantizer

__all__ = ["LOOKUP", "Int8Description", "describe", "lower_to_int8"]

LOOKUP = "timestep_lookup"
Activations = Literal["table", "dynamic"]
_DESCRIPTION = "tdq_int8"


@dataclass(frozen=True)
class Int8Description:
    """What is needed to lower the float architecture again.

    Attributes:
        operands: What each quantizer quantizes, in row order.
        weight_bits: Bits of each int8 layer's weight by the layer's path.
        cache_timestep_path: Whether the timestep path is tabulated.
        timestep_argument: Name of the input that holds the timestep; None if it is one of the
            usual names.
    """

    operands: dict[str, list[Operand]]
    weight_bits: dict[str, int]
    cache_timestep_path: bool
    timestep_argument: str | None = None


def lower_to_int8(
    model: fx.GraphModule,
    *,
    cache_timestep_path: bool = True,
    activations: Activations = "table",
) -> fx.GraphModule:
    """Run a frozen graph's convolutions and linear layers on integer kernels.

    Layers whose input is quantized take uint8 codes and give float32. Matrix products of two
    activations keep fake quantization; layers without a quantizer stay float, with their weight
    quantized if they have a weight quantizer. Batches of mixed timesteps run in the same graph.

    Args:
        model: An attached and frozen graph on the CPU; it stays as it is.
        cache_timestep_path: Tabulate all that depends on the timestep alone (the time embedding
            and its projections). It equals the uncached graph bit for bit for single samples.
        activations: `dynamic` ignores the table and takes each batch's own minimum and maximum,
            the input-dependent baseline.

    Returns:
        The lowered graph, in evaluation mode.

    Raises:
        AdapterError: The model is not frozen, not on the CPU, exported by `torch.export`, has a
            quantizer that is switched off or one that is dynamic for `activations="table"`, a
            layer without int8 form, or a quantized weight that the graph does not show.
        ConfigError: There is no such kind of `activations`.
        LookupRuleError: The cache was asked for with a lookup rule other than `exact`.
        TraceError: The timestep path cannot be tabulated.
    """
    check_option("activations", activations, get_args(Activations))
    bank = _cpu_bank(model)
    if cache_timestep_path and bank.lookup != "exact":
        raise LookupRuleError(
            f"The timestep path cannot be cached with lookup={bank.lookup!r}: between the "
            "table's timesteps its values are unknown. Pass cache_timestep_path=False."
        )
    lowered = copy.deepcopy(model).eval()
    operands = quantized_operands(lowered)
    _check_operands(operands)
    weight_bits = _lower_layers(lowered)
    lowered.meta[_DESCRIPTION] = Int8Description(
        operands, weight_bits, cache_timestep_path, timestep_input(lowered.graph)
    )
    quantizers = _lower_quantizers(lowered, dynamic=activations == "dynamic")
    _insert_lookup(lowered, quantizers, cache_timestep_path)
    lowered.graph.eliminate_dead_code()
    lowered.delete_all_unused_submodules()
    _check_no_weight_quantizer(lowered)
    lowered.graph.lint()
    lowered.recompile()
    return lowered.requires_grad_(False)


def describe(model: nn.Module) -> Int8Description:
    """The description of a lowered model.

    Raises:
        AdapterError: The model is not lowered.
    """
    description = getattr(model, "meta", {}).get(_DESCRIPTION)
    if not isinstance(description, Int8Description):
        raise AdapterError(
            f"This {type(model).__name__} is no int8 model. Call lower_to_int8(model) first."
        )
    return description


def _cpu_bank(model: fx.GraphModule) -> FrozenBank:
    if not isinstance(model, fx.GraphModule):
        raise AdapterError(f"Only graphs can be lowered to int8, not {type(model).__name__}.")
    bank = frozen_bank(model, "an int8 model")
    if bank.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise AdapterError(
            f"The integer kernels are onednn's, on the CPU; the model is on {bank.device} and "
            f"onednn is {'' if torch.backends.mkldnn.is_available() else 'not '}available. "
            "Call model.cpu(), and use a torch build with onednn."
        )
    return bank


def _check_operands(operands: dict[str, list[Operand]]) -> None:
    if operands and not any(operands.values()):
        raise AdapterError(
            f"The graph has {len(operands)} quantizers (first: {next(iter(operands))!r}), and none "
            "belongs to a layer or product that is known here; graphs from torch.export hold "
            "other operators. Convert those by tdq_plugin.adapters.pt2e.convert(model, "
            "fold_scales=True) for their backend, or prepare the model by torch.ao."
        )


def _lower_layers(graph_module: fx.GraphModule) -> dict[str, int]:
    """Replace the layers; returns the bits of those that became int8 layers."""
    quantizers = set(quantizer_nodes(graph_module).values())
    inputs: dict[str, list[object]] = {}
    for node in graph_module.graph.nodes:
        if is_layer(node):
            inputs.setdefault(str(node.target), []).append(node.args[0])
    bits = {}
    for path, arguments in inputs.items():
        layer = graph_module.get_submodule(path)
        quantizer = weight_quantizer(layer)
        if quantizer is None:
            # One that is switched off leaves with its layer.
            if hasattr(layer, "weight_fake_quant"):
                graph_module.set_submodule(path, float_layer(layer))
            continue
        if quantizers.issuperset(arguments) and has_integer_kernel(layer):
            bits[path] = quantizer.grid.bits
            int8 = int8_layer(layer)
            int8.largest_code = max(_largest_code(graph_module, node) for node in arguments)
            graph_module.set_submodule(path, int8)
        else:
            graph_module.set_submodule(path, float_layer(layer))
    return bits


def _check_no_weight_quantizer(graph_module: fx.GraphModule) -> None:
    for path, module in graph_module.named_modules():
        if isinstance(module, WeightQuantizer):
            layer = path.rpartition(".")[0]
            raise AdapterError(
                f"The weight of {layer!r} is quantized, and the graph calls no Conv1d, Conv2d or "
                "Linear of this name: it is another layer, or within a module that is called as a "
                "whole. Make the mapping with tdq_qconfig_mapping, or add "
                f"set_module_name({layer!r}, None) to your own."
            )


def _largest_code(graph_module: fx.GraphModule, node: object) -> int:
    """The largest uint8 code of a quantizer."""
    assert isinstance(node, fx.Node)
    quantizer = graph_module.get_submodule(str(node.target))
    assert isinstance(quantizer, ActivationQuantizer)
    return quantizer.grid.quant_max + uint8_shift(quantizer.grid)


def _lower_quantizers(graph_module: fx.GraphModule, dynamic: bool) -> dict[fx.Node, int]:
    """Replace the quantizers; returns the nodes that need a row, with its number."""
    int8_layers = set(graph_module.meta[_DESCRIPTION].weight_bits)
    rows = {}
    for row, node in enumerate(quantizer_nodes(graph_module).values()):
        module = graph_module.get_submodule(str(node.target))
        assert isinstance(module, ActivationQuantizer)
        if module.mode != "quantize" and not (module.mode == "dynamic" and dynamic):
            raise AdapterError(
                f"The quantizer {node.target!r} is in mode {module.mode!r}, so the lowered graph "
                "would differ from the model. Set its mode to 'quantize'; if all are 'dynamic', "
                "pass activations='dynamic'."
            )
        integer = [user for user in node.users if user.target in int8_layers]
        others = [user for user in node.users if user not in integer]
        codes, values = (DynamicCodes, DynamicValues) if dynamic else (TableCodes, TableValues)
        for kind, users in ((codes, integer), (values, others)):
            if users:
                path = f"quantizers.{kind.__name__}_{row}"
                graph_module.add_submodule(path, kind(module.grid))
                rows[_replace(node, path, users)] = row
        graph_module.graph.erase_node(node)
    return {} if dynamic else rows


def _replace(node: fx.Node, path: str, users: list[fx.Node]) -> fx.Node:
    with node.graph.inserting_before(node):
        quantizer = node.graph.call_module(path, (node.args[0],))
    for user in users:
        user.replace_input_with(node, quantizer)
    return quantizer


def _insert_lookup(
    graph_module: fx.GraphModule, quantizers: dict[fx.Node, int], cache: bool
) -> None:
    """Lead the rows to the quantizers, and replace the timestep path by its table."""
    graph = graph_module.graph
    bank, timesteps = graph_module.scale_bank, find_timestep_node(graph)
    assert isinstance(bank, FrozenBank)
    assert timesteps is not None
    boundaries = boundary_nodes(graph) if cache else []
    if not quantizers and not boundaries:
        return
    values = tabulate(graph_module, boundaries, bank.timesteps) if boundaries else None
    graph_module.add_submodule(LOOKUP, TimestepLookup(bank, values))
    rows, looked_up = _lookup_nodes(timesteps)
    for quantizer, row in quantizers.items():
        with graph.inserting_before(quantizer):
            entry = graph.call_function(operator.getitem, (rows, row))
        quantizer.args = (*quantizer.args, entry)
    depends, after = sources(graph), looked_up.next
    for index, boundary in enumerate(boundaries):
        with graph.inserting_before(after):
            value = graph.call_function(operator.getitem, (looked_up, index))
        users = {user for user in boundary.users if depends[user] != Source.TIMESTEP}
        boundary.replace_all_uses_with(value, users.__contains__)


def _lookup_nodes(timesteps: fx.Node) -> tuple[fx.Node, fx.Node]:
    graph = timesteps.graph
    with graph.inserting_after(timesteps):
        lookup = graph.call_module(LOOKUP, (timesteps, sample_input(graph)))
    with graph.inserting_after(lookup):
        values = graph.call_function(operator.getitem, (lookup, 1))
        return graph.call_function(operator.getitem, (lookup, 0)), values
