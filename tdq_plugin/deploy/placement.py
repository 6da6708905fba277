"""Where the quantizers of a graph sit, in words that survive tracing the model again."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from tdq_plugin.errors import AdapterError, TableMismatchError
from tdq_plugin.graph.compute import is_layer, is_product, is_quantizer, operand_indices
from tdq_plugin.graph.scale_edge import connect_scales
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.scales.frozen import FrozenBank

__all__ = ["Operand", "insert_quantizers", "quantized_operands", "quantizer_nodes"]

PRODUCT = "product"


@dataclass(frozen=True)
class Operand:
    """One argument of one call.

    Attributes:
        operation: Path of a layer, or `product` for any product of two activations.
        call: The how-manieth call of the operation, from 0.
        argument: Position of the argument.
    """

    operation: str
    call: int
    argument: int


def quantizer_nodes(graph_module: fx.GraphModule) -> dict[str, fx.Node]:
    """The attached quantizers' nodes by name, in the bank's row order.

    Raises:
        AdapterError: A quantizer is not connected to the scale bank.
    """
    names: Sequence[str] = graph_module.get_submodule("scale_bank").names  # type: ignore[assignment]
    rows: dict[int, fx.Node] = {}
    for node in graph_module.graph.find_nodes(op="call_module"):
        if is_quantizer(node):
            rows[_row(node)] = node
    return {names[row]: rows[row] for row in sorted(rows)}


def quantized_operands(graph_module: fx.GraphModule) -> dict[str, list[Operand]]:
    """What each quantizer of an attached graph quantizes."""
    addresses = _addresses(graph_module.graph)
    return {
        name: [
            Operand(*addresses[user], argument)
            for user in node.users
            for argument in operand_indices(user)
            if user.args[argument] is node
        ]
        for name, node in quantizer_nodes(graph_module).items()
    }


def insert_quantizers(
    graph_module: fx.GraphModule, operands: Mapping[str, Sequence[Operand]], bank: FrozenBank
) -> None:
    """Attach quantizers to a traced float graph; in place.

    Args:
        graph_module: A graph from `trace`.
        operands: What each quantizer of the bank quantizes.
        bank: The scales.

    Raises:
        TableMismatchError: The graph has no such operand.
    """
    graph = graph_module.graph
    calls = {address: node for node, address in _addresses(graph).items()}
    nodes = []
    for row, (name, grid) in enumerate(zip(bank.names, bank.grids, strict=True)):
        users = [_find(calls, name, operand) for operand in operands[name]]
        source = users[0].args[operands[name][0].argument]
        path = f"activation_quantizers.{row}"
        graph_module.add_submodule(path, ActivationQuantizer(grid))
        with graph.inserting_before(min(users)):
            quantizer = graph.call_module(path, (source,))
        for user, operand in zip(users, operands[name], strict=True):
            user.update_arg(operand.argument, quantizer)
        nodes.append(quantizer)
    graph_module.scale_bank = bank
    connect_scales(graph_module, nodes)


def _row(node: fx.Node) -> int:
    if len(node.args) < 3 or not isinstance(node.args[1], fx.Node):
        raise AdapterError(
            f"The quantizer {node.target!r} is not connected to the scale bank. "
            "Call tdq_plugin.attach(model) first."
        )
    row = node.args[1].args[1]
    assert isinstance(row, int)
    return row


def _addresses(graph: fx.Graph) -> dict[fx.Node, tuple[str, int]]:
    calls: Counter[str] = Counter()
    addresses = {}
    for node in graph.nodes:
        if is_layer(node) or is_product(node):
            operation = str(node.target) if is_layer(node) else PRODUCT
            addresses[node] = (operation, calls[operation])
            calls[operation] += 1
    return addresses


def _find(calls: Mapping[tuple[str, int], fx.Node], name: str, operand: Operand) -> fx.Node:
    node = calls.get((operand.operation, operand.call))
    if node is None or operand.argument not in operand_indices(node):
        raise TableMismatchError(
            f"The quantizer {name!r} belongs to call {operand.call} of {operand.operation!r}, "
            "which this model does not have. Load into the architecture that was saved."
        )
    return node
