"""The timestep input of an exported graph: one form for the scale bank, its own for the model."""

import inspect

import torch
from torch import Tensor, fx

from tdq_plugin.errors import TimestepError, TraceError
from tdq_plugin.graph.timestep_node import find_timestep_node, insert_timestep_node
from tdq_plugin.timestep import find_timestep_argument

__all__ = ["as_exported", "prepare_timestep_input"]


def prepare_timestep_input(
    graph_module: fx.GraphModule, timestep_argument: str | None = None
) -> None:
    """Let an exported graph take every form of the timestep, and mark where it enters; in place.

    `torch.export` fixes the dtype of the timestep and that there is one for each sample. The scale
    bank then sees the timestep as it is given, and the model as it was exported.

    Args:
        graph_module: From `torch.export.export(...).module()`. One that is marked stays as it is.
        timestep_argument: Name of the input, if it is not one of the usual names.

    Raises:
        TimestepError: There is no such input.
        TraceError: The model was exported with a timestep that has no dimension for samples.
    """
    graph = graph_module.graph
    if find_timestep_node(graph) is not None:
        return
    inputs = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    names = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in inputs]
    timestep = find_timestep_argument(inspect.Signature(names), timestep_argument)
    example = inputs[timestep].meta.get("val")
    if not isinstance(example, Tensor) or example.dim() != 1:
        shown = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise TraceError(
            f"The model was exported with a timestep of shape {shown}; export it with one timestep "
            "per sample, shape (B,), or use tdq_plugin.adapters.pt2e.export."
        )
    _drop_guards(graph)
    tensors = [name for name, node in inputs.items() if isinstance(node.meta.get("val"), Tensor)]
    sample = next(name for name in tensors if name != timestep)
    node = insert_timestep_node(graph, timestep, sample)
    if example.shape[0] != 1:
        with graph.inserting_after(node):
            batch = graph.call_function(torch.ops.aten.sym_size.int, (inputs[sample], 0))
        with graph.inserting_after(batch):
            own = graph.call_function(as_exported, (node, batch, example.dtype))
        node.replace_all_uses_with(own, lambda user: user is not own)
    graph_module.recompile()


def as_exported(timesteps: Tensor, batch: int, dtype: torch.dtype) -> Tensor:
    """A timestep for each sample, as the exported model takes it.

    Args:
        timesteps: Float32, shape `(1,)` or `(B,)`.
        batch: The number of samples, B.
        dtype: Of the example that the model was exported with.

    Raises:
        TimestepError: The number of timesteps is neither 1 nor B.
    """
    if not torch.compiler.is_compiling() and timesteps.shape[0] not in (1, batch):
        raise TimestepError(
            f"{timesteps.shape[0]} timesteps were given for {batch} samples. "
            "Give one for all, or one for each."
        )
    return timesteps.to(dtype).expand(batch)


def _drop_guards(graph: fx.Graph) -> None:
    # They compare the inputs with those of the export, and a timestep may now be a number.
    for node in graph.find_nodes(op="call_module", target="_guards_fn"):
        graph.erase_node(node)
