"""The signature of an exported graph: the model's own arguments instead of export's leaves."""

import operator
from collections.abc import Mapping
from itertools import islice
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import (
    KeyPath,
    MappingKey,
    SequenceKey,
    tree_flatten_with_path,
    tree_leaves,
    tree_unflatten,
)

from tdq_plugin.errors import TraceError

__all__ = ["with_plain_signature"]


def with_plain_signature(exported: fx.GraphModule, arguments: Mapping[str, Any]) -> fx.GraphModule:
    """A graph that is called as the model is, by position and by name.

    `torch.export` takes containers apart outside of the graph; here the graph does it.

    Args:
        exported: From `torch.export.export(...).module()`; changed.
        arguments: The example that was exported, by name, in the order of the graph's inputs.

    Raises:
        TraceError: An argument holds tensors in something else than dictionaries and sequences.
    """
    graph = exported.graph
    leaves = iter(graph.find_nodes(op="placeholder"))
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            next(leaves).target = name
        else:
            _take_apart(graph, name, value, list(islice(leaves, len(tree_leaves(value)))))
    output = graph.output_node()
    values, structure = output.args[0], exported._out_spec
    assert isinstance(values, tuple)
    assert structure is not None
    output.args = (tree_unflatten(values, structure),)
    graph.set_codegen(fx.graph.CodeGen())
    # A new one has no hook that checks the old convention.
    return fx.GraphModule(exported, graph)


def _take_apart(graph: fx.Graph, name: str, value: Any, leaves: list[fx.Node]) -> None:
    """One input in place of those of its leaves."""
    with graph.inserting_before(leaves[0]):
        container = graph.placeholder(name)
    after_inputs = list(graph.find_nodes(op="placeholder"))[-1].next
    paths, _ = tree_flatten_with_path(value)
    for (path, _), leaf in zip(paths, leaves, strict=True):
        # Numbers beside the tensors are constants of the graph.
        if leaf.users:
            with graph.inserting_before(after_inputs):
                leaf.replace_all_uses_with(_item(graph, container, path, leaf))
        graph.erase_node(leaf)


def _item(graph: fx.Graph, container: fx.Node, path: KeyPath, leaf: fx.Node) -> fx.Node:
    item = container
    for key in path:
        if not isinstance(key, MappingKey | SequenceKey):
            raise TraceError(
                f"The argument {container.target!r} holds a tensor at {key}, and the graph takes "
                "dictionaries and sequences of tensors. Give the model's forward such an argument."
            )
        index = key.key if isinstance(key, MappingKey) else key.idx
        item = graph.call_function(operator.getitem, (item, index))
    item.meta = {**leaf.meta}
    return item
