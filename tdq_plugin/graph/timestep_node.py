"""The node at the top of a graph that brings the timestep input into one form."""

from itertools import pairwise

from torch import fx

from tdq_plugin.errors import TraceError
from tdq_plugin.timestep import as_timesteps

__all__ = ["find_timestep_node", "insert_timestep_node", "timestep_input"]


def find_timestep_node(graph: fx.Graph) -> fx.Node | None:
    """The node that gives the timestep as a float32 tensor of shape `(B,)`, if there is one."""
    return next(iter(graph.find_nodes(op="call_function", target=as_timesteps)), None)


def timestep_input(graph: fx.Graph) -> str | None:
    """Name of the input that holds the timestep, if the graph has a timestep node."""
    node = find_timestep_node(graph)
    raw = node.args[0] if node is not None else None
    return str(raw.target) if isinstance(raw, fx.Node) else None


def insert_timestep_node(graph: fx.Graph, timestep: str, sample: str | None) -> fx.Node:
    """Send every use of the timestep input through `as_timesteps`.

    Args:
        graph: The graph to change.
        timestep: Name of the input that holds the timestep.
        sample: Name of a tensor input on whose device a timestep given as a number is created.

    Returns:
        The new node, right after the graph's inputs.

    Raises:
        TraceError: The graph has no input of that name.
    """
    inputs = graph.find_nodes(op="placeholder")
    by_name = {str(node.target): node for node in inputs}
    if timestep not in by_name:
        raise TraceError(f"The graph has no input {timestep!r}; its inputs are {list(by_name)}.")
    for before, after in pairwise(inputs):
        before.append(after)
    with graph.inserting_before(inputs[-1].next):
        device = graph.call_function(getattr, (by_name[sample], "device")) if sample else None
        node = graph.call_function(as_timesteps, (by_name[timestep], device))
    by_name[timestep].replace_all_uses_with(node, lambda user: user is not node)
    # The mark of torch.fx.wrap: frameworks that trace the graph again must not look inside.
    node.meta["is_wrapped"] = True
    for new in (node, device):
        if new is not None:
            new.meta["module_path"] = ""
    return node
