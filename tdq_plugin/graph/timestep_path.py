"""Which nodes of a graph depend on the timestep, and on nothing that differs between samples."""

from enum import Flag, auto

import torch
from torch import fx

from tdq_plugin.graph.timestep_node import find_timestep_node, timestep_input
from tdq_plugin.sample_argument import find_sample_argument

__all__ = ["Source", "sample_input", "sees_samples", "sources"]

_SHAPE_ATTRIBUTES = {"shape", "dtype", "device"}
_SHAPE_METHODS = {"size", "dim", "numel"}


class Source(Flag):
    """What a node's value depends on."""

    NOTHING = 0
    TIMESTEP = auto()
    CONDITION = auto()
    SAMPLE = auto()


def sees_samples(depends: Source) -> bool:
    """Whether a value is on the sample's path, or a constant; else it is the timestep's alone."""
    return Source.SAMPLE in depends or Source.TIMESTEP not in depends


def sample_input(graph: fx.Graph) -> fx.Node | None:
    """The sample among the graph's inputs, by `find_sample_argument`; None without inputs."""
    timestep = timestep_input(graph)
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    name = find_sample_argument(name for name in inputs if name != timestep)
    return None if name is None else inputs[name]


def sources(graph: fx.Graph) -> dict[fx.Node, Source]:
    """What each node depends on; the shape of a tensor counts as nothing.

    Inputs beside the sample are conditions, such as class labels or text embeddings.
    """
    timesteps, sample = find_timestep_node(graph), sample_input(graph)
    raw = timesteps.args[0] if timesteps is not None else None
    found: dict[fx.Node, Source] = {}
    for node in graph.nodes:
        if node in (raw, timesteps):
            found[node] = Source.TIMESTEP
        elif node.op == "placeholder":
            found[node] = Source.SAMPLE if node is sample else Source.CONDITION
        elif _reads_shape(node):
            found[node] = Source.NOTHING
        else:
            found[node] = Source.NOTHING
            for argument in node.all_input_nodes:
                found[node] |= found[argument]
    return found


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    if node.target is getattr:
        return node.args[1] in _SHAPE_ATTRIBUTES
    # The second one is that of graphs from torch.export.
    return node.target in (torch.numel, torch.ops.aten.sym_size.int)
