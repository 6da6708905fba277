"""Cut a graph into blocks that are reconstructed one after the other."""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor, fx

from tdq_plugin.graph.compute import is_quantizer
from tdq_plugin.graph.timestep_path import Source, sources

__all__ = ["BLOCK_PATTERN", "Block", "Granularity", "find_blocks", "run_block"]

Granularity = Literal["block", "network"]
BLOCK_PATTERN = (
    r".*?\b(?:resnets|attentions|transformer_blocks|downsamplers|upsamplers|blocks|layers)\.\d+"
)


@dataclass(frozen=True)
class Block:
    """A part of a graph.

    Attributes:
        name: Path of the module that the nodes belong to.
        nodes: Nodes to run, in order. What depends on the timestep, on conditions or on shapes
            alone is run again in each block rather than handed over.
        inputs: Nodes of earlier blocks whose values are needed.
        outputs: Nodes whose values later blocks need, or the graph's result.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def find_blocks(
    graph: fx.Graph, granularity: Granularity = "block", pattern: str = BLOCK_PATTERN
) -> list[Block]:
    """Cut a graph along its modules.

    Args:
        graph: A graph from `tdq_plugin.trace`, prepared or not.
        granularity: `block` cuts as `pattern` says, `network` makes one block of everything.
        pattern: Regular expression for the start of a layer's path; layers with the same match
            that follow each other form a block. A layer that does not match is named by its first
            path component.

    Returns:
        The blocks, in order of execution.
    """
    depends = sources(graph)
    on_path = [n for n in graph.nodes if Source.SAMPLE in depends[n] and _computes(n)]
    names = _names(on_path, granularity, pattern)
    groups: list[tuple[str, list[fx.Node]]] = []
    for node, name in zip(on_path, names, strict=True):
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        groups[-1][1].append(node)
    blocks = [_block(name, nodes, depends) for name, nodes in groups]
    result = {node for end in graph.find_nodes(op="output") for node in end.all_input_nodes}
    needed = result.union(*(block.inputs for block in blocks))
    return [
        _with_outputs(block, nodes, needed)
        for block, (_, nodes) in zip(blocks, groups, strict=True)
    ]


def run_block(
    module: fx.GraphModule, block: Block, values: dict[fx.Node, Any]
) -> dict[fx.Node, Tensor]:
    """Run a block.

    Args:
        module: The graph's module.
        block: One of its blocks.
        values: Values of the block's inputs and of the graph's placeholders.

    Returns:
        Values of the block's outputs.
    """
    interpreter = fx.Interpreter(module, garbage_collect_values=False)
    interpreter.env = dict(values)
    for node in block.nodes:
        interpreter.env[node] = interpreter.run_node(node)
    return {node: interpreter.env[node] for node in block.outputs}


def _computes(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "output")


def _names(nodes: list[fx.Node], granularity: Granularity, pattern: str) -> list[str]:
    """Name of each node's block: its module's; without a module, that of the node before it."""
    if granularity == "network":
        return ["network"] * len(nodes)
    names: list[str] = []
    for node in nodes:
        path = _module_path(node)
        if path:
            match = re.match(pattern, path)
            names.append(match.group(0) if match else path.split(".")[0])
        else:
            names.append(names[-1] if names else "")
    # A quantizer belongs to the layer that it serves.
    for index in reversed(range(len(nodes) - 1)):
        if not names[index] or is_quantizer(nodes[index]):
            names[index] = names[index + 1]
    return names


def _module_path(node: fx.Node) -> str:
    path = str(node.meta.get("module_path") or "")
    if not path and node.op == "call_module" and not is_quantizer(node):
        path = str(node.target)
    return path


def _block(name: str, owned: list[fx.Node], depends: dict[fx.Node, Source]) -> Block:
    members = set(owned)
    inputs: list[fx.Node] = []
    pending = list(owned)
    while pending:
        for argument in pending.pop().all_input_nodes:
            if argument in members or argument in inputs or argument.op == "placeholder":
                continue
            if Source.SAMPLE in depends[argument]:
                inputs.append(argument)
            else:
                members.add(argument)
                pending.append(argument)
    order = [node for node in owned[0].graph.nodes if node in members]
    return Block(name, tuple(order), tuple(inputs), ())


def _with_outputs(block: Block, owned: list[fx.Node], needed: set[fx.Node]) -> Block:
    return replace(block, outputs=tuple(node for node in owned if node in needed))
