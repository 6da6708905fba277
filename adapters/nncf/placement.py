"""What each of NNCF's quantizers quantizes, read off NNCF's graph of a call of the model."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from nncf.common.graph import NNCFGraph, NNCFNode
from nncf.common.quantization.quantizer_propagation.structs import QuantizationTrait
from nncf.torch.function_hook import get_hook_storage
from nncf.torch.function_hook.hook_storage import decode_hook_name
from nncf.torch.graph import operator_metatypes as om
from nncf.torch.model_graph_manager import CONV_META_TYPES
from nncf.torch.quantization.default_quantization import DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT
from nncf.torch.quantization.layers import BaseQuantizer
from torch import nn

from tdq_plugin.adapters.nncf.settings import TIMESTEP_PATTERNS
from tdq_plugin.timestep import TIMESTEP_NAMES

__all__ = ["Operand", "Site", "find_sites", "layers", "quantized_timestep_operation"]

# Positions of the arguments that an operation multiplies.
_OPERANDS = {metatype: (0, 1) for metatype in (*CONV_META_TYPES, om.PTLinearMetatype)} | {
    om.PTMatMulMetatype: (0, 1),
    # The first argument of baddbmm is added, not multiplied.
    om.PTAddmmMetatype: (1, 2),
    om.PTScaledDotProductAttentionMetatype: (0, 1, 2),
}
# Operations that move values without computing on them: NNCF lifts quantizers above these.
_MOVES = (
    *DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT[QuantizationTrait.QUANTIZATION_AGNOSTIC],
    *DEFAULT_PT_QUANT_TRAIT_TO_OP_DICT[QuantizationTrait.CONCAT],
)


@dataclass(frozen=True)
class Operand:
    """An argument of a layer or a product.

    Attributes:
        operation: The number of the operation in the graph, ascending in order of execution.
        name: The operation's name in the graph, `path/of/its/module/function/number`.
        port: Position among the operation's arguments.
        layer: Path of the layer's module, or the name of a weight that the model itself holds;
            None for a product of two activations.
    """

    operation: int
    name: str
    port: int
    layer: str | None


@dataclass(frozen=True)
class Site:
    """One quantizer of NNCF, which may sit on several values.

    Attributes:
        quantizer: The module.
        hooks: The names of its places in the model's hook storage.
        weight: Path of the parameter or buffer that it quantizes; None if it quantizes an
            activation.
        operands: What it quantizes, in order of execution.
        inputs: Names of the model's arguments that the quantized value depends on.
    """

    quantizer: BaseQuantizer
    hooks: tuple[str, ...]
    weight: str | None
    operands: tuple[Operand, ...]
    inputs: frozenset[str]


def find_sites(model: nn.Module, graph: NNCFGraph) -> list[Site]:
    """All quantizers of a model that `nncf.quantize` returned, in order of execution.

    Args:
        model: The model.
        graph: NNCF's graph of it, with the quantizers as nodes.
    """
    hooks: dict[BaseQuantizer, list[str]] = {}
    for name, module in get_hook_storage(model).named_hooks(remove_duplicate=False):
        if isinstance(module, BaseQuantizer):
            hooks.setdefault(module, []).append(name)
    sites = []
    for quantizer, names in hooks.items():
        nodes = [_quantize_node(graph, name) for name in names]
        first = min(node.node_id for node in nodes)
        sites.append((first, _site(graph, quantizer, names, nodes)))
    return [site for _, site in sorted(sites, key=lambda pair: pair[0])]


def layers(sites: list[Site]) -> list[str]:
    """The layers with a quantized weight, in order of execution."""
    found = {
        operand.operation: operand.layer
        for site in sites
        if site.weight is not None
        for operand in site.operands
    }
    return [layer for _, layer in sorted(found.items()) if layer is not None]


def quantized_timestep_operation(model: nn.Module) -> str | None:
    """An operation on the timestep's own path that NNCF quantized, as far as names tell.

    Without a call of the model there is no graph; the names of hooks know the model's arguments
    and the modules of diffusers' time embeddings.
    """
    for name, module in get_hook_storage(model).named_hooks():
        _, operation, _ = decode_hook_name(name)
        is_timestep = operation in TIMESTEP_NAMES or any(
            re.fullmatch(pattern, operation) for pattern in TIMESTEP_PATTERNS
        )
        if is_timestep and isinstance(module, BaseQuantizer):
            return str(operation)
    return None


def _site(
    graph: NNCFGraph, quantizer: BaseQuantizer, names: list[str], nodes: list[NNCFNode]
) -> Site:
    operands = {operand for node in nodes for operand in _operands(graph, node)}
    return Site(
        quantizer,
        tuple(names),
        _constant(graph, nodes[0]),
        tuple(sorted(operands, key=lambda operand: (operand.operation, operand.port))),
        frozenset(name for node in nodes for name in _inputs(graph, node)),
    )


def _quantize_node(graph: NNCFGraph, hook_name: str) -> NNCFNode:
    kind, operation, port = decode_hook_name(hook_name)
    node = graph.get_node_by_name(operation)
    if kind == "pre_hooks":
        return graph.get_input_edge_by_port_id(node, port).from_node
    following = [edge.to_node for edge in graph.get_output_edges_by_port_id(node, port)]
    return next(node for node in following if node.node_type in om.QUANTIZE_NODE_TYPES)


def _operands(graph: NNCFGraph, node: NNCFNode) -> Iterator[Operand]:
    for edge in graph.get_output_edges(node):
        user, port = edge.to_node, edge.input_port_id
        if port in _OPERANDS.get(user.metatype, ()):
            yield Operand(user.node_id, user.node_name, port, _layer(graph, user))
        elif user.metatype in _MOVES:
            yield from _operands(graph, user)


def _layer(graph: NNCFGraph, node: NNCFNode) -> str | None:
    """Path of the module whose weight a node multiplies with."""
    for edge in graph.get_input_edges(node):
        weight = _constant(graph, edge.from_node) if edge.input_port_id in (0, 1) else None
        if weight is not None:
            # What the model itself holds has no module of its own.
            return weight.rpartition(".")[0] or weight
    return None


def _constant(graph: NNCFGraph, node: NNCFNode) -> str | None:
    """Name of the parameter or buffer that a node holds, quantized or moved or not."""
    if node.metatype is om.PTConstNoopMetatype:
        name: str = node.layer_attributes.name
        return name
    if node.node_type in om.QUANTIZE_NODE_TYPES or node.metatype in _MOVES:
        edges = graph.get_input_edges(node)
        return _constant(graph, min(edges, key=lambda edge: edge.input_port_id).from_node)
    return None


def _inputs(graph: NNCFGraph, node: NNCFNode) -> set[str]:
    """Names of the model's arguments that a node's value depends on."""
    found, pending, seen = set(), [node], set()
    while pending:
        current = pending.pop()
        if current.node_id in seen:
            continue
        seen.add(current.node_id)
        if current.metatype is om.PTInputNoopMetatype:
            found.add(current.node_name)
        pending.extend(graph.get_previous_nodes(current))
    return found
