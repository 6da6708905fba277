"""From a diffusion model to a graph that takes the timestep as an explicit input."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from tdq_plugin.errors import TDQError, TraceError
from tdq_plugin.evaluation_mode import evaluation_mode
from tdq_plugin.graph.compute import normalise_calls
from tdq_plugin.graph.concolic import ConcolicTracer
from tdq_plugin.graph.dropout import dropout_to_modules
from tdq_plugin.graph.timestep_node import find_timestep_node, insert_timestep_node
from tdq_plugin.timestep import as_timesteps, find_timestep_argument

__all__ = ["trace"]

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def trace(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | dict[str, Any],
    *,
    timestep_argument: str | None = None,
) -> fx.GraphModule:
    """Trace a model into a graph whose first operation brings the timestep into one form.

    The graph shares the model's parameters and modules; copy the model first to keep the two apart.
    It serves every batch size, and timesteps given as python numbers, 0-d or 1-d tensors. Branches,
    dtypes and python loops are those of the example call in evaluation mode (a loop over the batch
    keeps the example's length); dropout still follows `train()` and `eval()`. The model itself, its
    buffers and its training flags stay as they are.

    Args:
        model: A module, or a graph traced before. A graph that already begins with the timestep
            operation is returned as it is.
        example_inputs: One call of the model: positional arguments as a tuple, or arguments by
            name. Arguments that hold tensors become inputs of the graph under their own names,
            others become constants.
        timestep_argument: Name of forward's argument that holds the timestep; by default found
            among the usual names.

    Returns:
        The graph. It returns the sample itself where the model would wrap it (`return_dict`), else
        what the model returns. Each node's `meta["module_path"]` names the module that ran it.

    Raises:
        TimestepError: forward has no timestep argument.
        TraceError: The example does not fit forward, forward raises on it, or forward branches on
            the values of a tensor.

    Example:
        >>> class Denoiser(nn.Module):
        ...     def forward(self, sample, timestep):
        ...         return sample * timestep.view(-1, 1)
        >>> graph_module = trace(Denoiser(), (torch.ones(1, 2), 10))
        >>> graph_module(torch.ones(2, 2), torch.tensor([3, 5]))
        tensor([[3., 3.],
                [5., 5.]])
    """
    signature = inspect.signature(model.forward)
    timestep_name = find_timestep_argument(signature, timestep_argument)
    if isinstance(model, fx.GraphModule) and find_timestep_node(model.graph) is not None:
        return model
    call = _bind(signature, example_inputs, timestep_name)
    tensors = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]
    sample_name = next((name for name in tensors if name != timestep_name), None)
    if isinstance(model, fx.GraphModule):
        graph_module = fx.GraphModule(model, copy.deepcopy(model.graph))
    else:
        device = call.arguments[sample_name].device if sample_name else None
        call.arguments[timestep_name] = as_timesteps(call.arguments[timestep_name], device)
        graph_module = _record(model, call)
    insert_timestep_node(graph_module.graph, timestep_name, sample_name)
    normalise_calls(graph_module.graph)
    graph_module.recompile()
    return graph_module


def _bind(
    signature: inspect.Signature, example_inputs: tuple[Any, ...] | dict[str, Any], timestep: str
) -> inspect.BoundArguments:
    args, kwargs = (
        ((), example_inputs) if isinstance(example_inputs, dict) else (example_inputs, {})
    )
    try:
        call = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TraceError(
            f"The example inputs do not fit the model's forward: {error}. "
            f"Its arguments are {list(signature.parameters)}."
        ) from error
    if timestep not in call.arguments:
        raise TraceError(
            f"The example inputs lack the timestep argument {timestep!r}. Add one, for example 0."
        )
    for name in call.arguments:
        if signature.parameters[name].kind in _VARIADIC:
            raise TraceError(
                f"Some example inputs fall under forward's variadic argument {name!r}, which "
                "cannot become inputs of a graph. Give only arguments that forward names."
            )
    return call


def _record(model: nn.Module, call: inspect.BoundArguments) -> fx.GraphModule:
    has_return_dict = "return_dict" in call.signature.parameters
    if has_return_dict:
        call.arguments["return_dict"] = False
    # Cloned, lest an in-place operation of the model write into the caller's tensors.
    for name, value in call.arguments.items():
        call.arguments[name] = tree_map_only(Tensor, torch.clone, value)
    inputs = [name for name in call.arguments if _holds_tensor(call.arguments[name])]
    tracer = ConcolicTracer(call, inputs, _first if has_return_dict else _unchanged)
    # A tracer stores tensor constants on the module that it traces; here on a shallow copy.
    root = copy.copy(model)
    with torch.no_grad(), evaluation_mode(root), _same_buffers(root):
        try:
            graph = tracer.trace(root)
        except TDQError:
            raise
        except Exception as error:
            _check_forward_runs(root, call)
            raise TraceError(
                f"{type(model).__name__}.forward holds something that cannot be recorded: "
                f"{type(error).__name__}: {error} Write that part of forward with tensor "
                "operations, or use an adapter that needs no graph."
            ) from error
    graph_module = fx.GraphModule(root, graph, class_name=type(model).__name__)
    dropout_to_modules(graph_module)
    return graph_module


def _check_forward_runs(model: nn.Module, call: inspect.BoundArguments) -> None:
    try:
        model(*call.args, **call.kwargs)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__}.forward raises {type(error).__name__} on the example inputs: "
            f"{error} Give inputs that the model accepts; the timestep reaches it as a float32 "
            "tensor of shape (B,)."
        ) from error


@contextmanager
def _same_buffers(model: nn.Module) -> Iterator[None]:
    """Afterwards buffers are as before."""
    buffers = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    try:
        yield
    finally:
        for module, name, buffer, content in buffers:
            setattr(module, name, buffer)
            buffer.copy_(content)


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _unchanged(output: Any) -> Any:
    return output
