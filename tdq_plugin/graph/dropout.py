"""Dropout that follows `train()` and `eval()` after tracing."""

import inspect

from torch import fx, nn
from torch.nn import functional

__all__ = ["dropout_to_modules"]

_SIGNATURE = inspect.signature(functional.dropout)


def dropout_to_modules(graph_module: fx.GraphModule) -> None:
    """Replace calls of `functional.dropout` that were off in evaluation mode by dropout modules.

    A trace fixes the call's `training` flag. A call that was on although the model was in
    evaluation mode is meant to be always on, and stays.

    Args:
        graph_module: A graph that was traced in evaluation mode; changed in place.
    """
    graph = graph_module.graph
    calls = graph.find_nodes(op="call_function", target=functional.dropout)
    for index, node in enumerate(calls):
        call = _SIGNATURE.bind(*node.args, **node.kwargs)
        call.apply_defaults()
        if call.arguments["training"]:
            continue
        name = f"functional_dropout_{index}"
        dropout = nn.Dropout(call.arguments["p"], call.arguments["inplace"])
        graph_module.add_submodule(name, dropout.train(graph_module.training))
        with graph.inserting_before(node):
            replacement = graph.call_module(name, (call.arguments["input"],))
        replacement.meta = node.meta.copy()
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
