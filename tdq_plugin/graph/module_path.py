"""Which module of the model a graph node came from."""

from collections import defaultdict

from torch import fx

__all__ = ["copy_module_paths"]


def copy_module_paths(source: fx.Graph, retraced: fx.Graph) -> None:
    """Give the nodes of a graph that was traced again the `module_path` they had before.

    Tracing a graph again (as `prepare_fx` and `prepare_qat_fx` do) drops the nodes' meta and
    renames some nodes, but keeps the order of the calls: the n-th call of an operation is the n-th
    call of it in the source. An operation that does not occur equally often in both graphs, such as
    an inserted quantizer, is left without a path.

    Args:
        source: A graph from `trace`.
        retraced: The graph that was made from it; its nodes' meta is changed in place.
    """
    calls = _calls(retraced)
    for operation, before in _calls(source).items():
        after = calls[operation]
        if len(before) == len(after):
            for old, new in zip(before, after, strict=True):
                new.meta["module_path"] = old.meta["module_path"]


def _calls(graph: fx.Graph) -> defaultdict[tuple[str, object], list[fx.Node]]:
    calls: defaultdict[tuple[str, object], list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        calls[node.op, node.target].append(node)
    return calls
