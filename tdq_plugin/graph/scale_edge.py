"""The explicit edge: scales flow from the bank to the quantizers as values of the graph."""

import operator
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import fx

from tdq_plugin.errors import TraceError
from tdq_plugin.graph.timestep_node import find_timestep_node

__all__ = ["BANK", "connect_scales"]

BANK = "scale_bank"


def connect_scales(module: fx.GraphModule, quantizers: Sequence[fx.Node]) -> None:
    """Evaluate the bank once at the top of the graph and give quantizer i its row i.

    Args:
        module: A graph with a timestep node and a submodule `scale_bank`; changed in place.
        quantizers: The quantizers' nodes in the bank's row order; each gets the arguments
            `(x, scale, zero_point)`.

    Raises:
        TraceError: The graph has no timestep node.
    """
    graph = module.graph
    timesteps = find_timestep_node(graph)
    if timesteps is None:
        raise TraceError("The graph has no timestep node. Make the graph with tdq_plugin.trace.")
    _hoist(graph, timesteps)
    with graph.inserting_after(timesteps):
        rows = graph.call_module(BANK, (timesteps,))
    with graph.inserting_after(rows):
        scales = _unbound(graph, rows, 0)
        zero_points = _unbound(graph, rows, 1)
    for row, node in enumerate(quantizers):
        with graph.inserting_before(node):
            scale = graph.call_function(operator.getitem, (scales, row))
            zero_point = graph.call_function(operator.getitem, (zero_points, row))
        node.args = (node.args[0], scale, zero_point)
    graph.lint()
    module.recompile()


def _unbound(graph: fx.Graph, rows: fx.Node, index: int) -> fx.Node:
    table = graph.call_function(operator.getitem, (rows, index))
    with graph.inserting_after(table):
        return graph.call_function(torch.unbind, (table,))


def _hoist(graph: fx.Graph, timesteps: fx.Node) -> None:
    """Move the inputs and the timestep node to the top: a quantizer may stand between them."""
    inputs = graph.find_nodes(op="placeholder")
    for before, after in pairwise(inputs):
        before.append(after)
    previous = inputs[-1]
    for argument in [*timesteps.all_input_nodes, timesteps]:
        if argument.op != "placeholder":
            previous.append(argument)
            previous = argument
