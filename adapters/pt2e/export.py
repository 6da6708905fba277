"""From a diffusion model to the exported graph that torchao prepares."""

import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map

from tdq_plugin.adapters.pt2e.plain_signature import with_plain_signature
from tdq_plugin.adapters.pt2e.timestep_input import prepare_timestep_input
from tdq_plugin.batch_layout import has_samples
from tdq_plugin.errors import TraceError
from tdq_plugin.graph.trace import trace
from tdq_plugin.timestep import as_timesteps, find_timestep_argument

__all__ = ["export"]


def export(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    timestep_argument: str | None = None,
) -> fx.GraphModule:
    """Export a model into a graph of ATen operators that serves every batch size.

    `torch.export` alone bounds the batch of diffusers' UNets at 63, because they branch on it; so
    the model is traced first (`tdq_plugin.trace`). The graph takes its inputs by position and by
    name, also dictionaries and sequences of tensors, and timesteps as numbers or tensors.

    Args:
        model: The model; the graph has its parameters, as `torch.export` does.
        example_inputs: One call of the model with two samples or more: positional arguments as a
            tuple, or arguments by name.
        timestep_argument: Name of forward's argument that holds the timestep; by default found
            among the usual names.

    Returns:
        A graph for `prepare_qat_pt2e` or `prepare_pt2e`.

    Raises:
        TimestepError: forward has no timestep argument.
        TraceError: The example has one sample, forward cannot be traced or exported, or one of its
            arguments holds tensors in something else than dictionaries and sequences.

    Example:
        >>> class Denoiser(nn.Module):
        ...     def forward(self, sample, timestep):
        ...         return sample * timestep.view(-1, 1)
        >>> graph_module = export(Denoiser(), (torch.ones(2, 2), 10))
        >>> graph_module(torch.ones(1, 2), timestep=3)
        tensor([[3., 3.]])
    """
    timestep = find_timestep_argument(model.forward, timestep_argument)
    graph_module = trace(model, example_inputs, timestep_argument=timestep)
    arguments = _arguments(model, graph_module, example_inputs, timestep)
    batch = len(arguments[timestep])
    dimension = torch.export.Dim("batch", min=2)
    shapes = tree_map(lambda value: _shape(value, batch, dimension), arguments)
    try:
        program = torch.export.export(graph_module, (), arguments, dynamic_shapes=shapes)
    except Exception as error:
        raise TraceError(
            f"torch.export cannot take {type(model).__name__}: {type(error).__name__}: {error} "
            "Use the torch_ao adapter, which needs no export."
        ) from error
    # The guards hold the batch to what export proves, two or more; the operators take one as well.
    exported = with_plain_signature(program.module(check_guards=False), arguments)
    prepare_timestep_input(exported, timestep)
    return exported


def _arguments(
    model: nn.Module, graph_module: fx.GraphModule, example: Any, timestep: str
) -> dict[str, Any]:
    """The example by the names of the graph's inputs, with a timestep for each sample."""
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    names = [str(node.target) for node in graph_module.graph.find_nodes(op="placeholder")]
    arguments = {name: given[name] for name in names}
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.dim()]
    batch = len(next(tensor for tensor in tensors if tensor is not arguments[timestep]))
    if batch == 1:
        raise TraceError(
            "The example has one sample, which torch.export would take for a constant. Give two."
        )
    steps = as_timesteps(arguments[timestep])
    arguments[timestep] = steps.expand(batch).clone()
    return arguments


def _shape(value: Any, batch: int, dimension: Any) -> Any:
    return {0: dimension} if has_samples(value, batch) else None
