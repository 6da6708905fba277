"""The road of the scales where there is no graph: from the model's call to its quantizers.

A hook on the model reads the timestep of each call, evaluates the scale bank once, and a hook on
each quantizer hands it its row. Frameworks that replace modules share this road.
"""

import inspect
import threading
from collections.abc import Container, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.attach import named_quantizers, scale_bank
from tdq_plugin.errors import AdapterError, CalibrationError, TimestepError
from tdq_plugin.sample_argument import find_sample_argument
from tdq_plugin.timestep import bind_timestep, find_timestep_argument

__all__ = [
    "ScaleRow",
    "argument_names",
    "at_timestep",
    "checkpoint_contexts",
    "connect_rows",
    "disconnect_rows",
    "scale_rows",
]

Rows = tuple[Tensor, Tensor]
# The rows of a call, or why there are none, and the calls around it.
_Calls = tuple[Rows | CalibrationError | None, "_Calls"] | None


def connect_rows(model: nn.Module, timestep_argument: str | None = None) -> None:
    """Lead the rows of `model.scale_bank` to the model's quantizers by forward hooks.

    The hooks belong to the model: a deep copy gets its own, a state dict knows nothing of them.
    Threads may call one model with different timesteps. Scales exist only during a call of the
    model; a quantizer that runs outside of one raises.

    Args:
        model: The model, with its bank and its quantizers' paths set; changed in place.
        timestep_argument: Name of forward's argument that holds the timestep, if it is not one of
            the usual names.

    Raises:
        TimestepError: forward has no such argument.
    """
    rows = scale_rows(model, timestep_argument)
    for row, (_, quantizer) in zip(rows, named_quantizers(model), strict=True):
        quantizer.register_forward_pre_hook(row)


def scale_rows(model: nn.Module, timestep_argument: str | None = None) -> list["ScaleRow"]:
    """As `connect_rows`, for a framework that hands the rows to its quantizers itself.

    Returns:
        One row for each quantizer, in the order of the bank.
    """
    signature = inspect.signature(model.forward)
    current = _CurrentRows(find_timestep_argument(signature, timestep_argument), signature)
    model.register_forward_pre_hook(current.begin, with_kwargs=True)
    model.register_forward_hook(current.end, always_call=True)
    return [ScaleRow(current, row) for row in range(len(scale_bank(model).names))]


def disconnect_rows(model: nn.Module) -> None:
    """Undo `connect_rows` on the model itself; its quantizers keep their hooks."""
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if isinstance(getattr(hook, "__self__", None), _CurrentRows):
                del hooks[key]


@contextmanager
def at_timestep(model: nn.Module, timestep: Tensor | float) -> Iterator[None]:
    """Within the block, parts of a model run for a timestep, outside of a call of the model.

    Args:
        model: The attached model that the parts belong to.
        timestep: As the model takes it.

    Raises:
        AdapterError: The model's scales do not travel by hooks.
    """
    with _current_rows(model).given(scale_bank(model)(timestep)):
        yield


def checkpoint_contexts(
    model: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts that keep the scales of a call for activation checkpointing.

    A checkpointed block runs again during backward, when the model's call is over. Pass
    `context_fn=functools.partial(checkpoint_contexts, model)` and `use_reentrant=False` to
    `torch.utils.checkpoint.checkpoint`. Without it, backward raises `TimestepError`.

    Args:
        model: The attached model whose call is running.

    Returns:
        The contexts of the forward pass and of the recomputation.

    Raises:
        AdapterError: The model's scales do not travel by hooks.
        TimestepError: No call of the model is running.
    """
    current = _current_rows(model)
    return nullcontext(), current.given(current.take())


def argument_names(model: nn.Module, conditions: Container[str] = ()) -> tuple[str, str]:
    """What the model's forward calls the sample and the timestep.

    Args:
        model: The attached model.
        conditions: Names of arguments that are given, too. The sample is found among those that
            are neither the timestep nor one of them (`find_sample_argument`).

    Raises:
        AdapterError: The model's scales do not travel by hooks, or no argument is left for the
            sample.
    """
    current = _current_rows(model)
    arguments, timestep = list(current.signature.parameters), current.timestep_argument
    sample = find_sample_argument(
        name for name in arguments if name != timestep and name not in conditions
    )
    if sample is not None:
        return sample, timestep
    raise AdapterError(
        f"The forward of this {type(model).__name__} has the arguments {arguments}, and besides "
        f"the timestep {timestep!r} and the conditions that were given none is left for the "
        "sample. Give conditions by the names of other arguments."
    )


def _current_rows(model: nn.Module) -> "_CurrentRows":
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    current = next((owner for owner in owners if isinstance(owner, _CurrentRows)), None)
    if current is None:
        raise AdapterError(
            f"This {type(model).__name__} has no scale hooks. Give the model that was attached; "
            "a graph needs no such context."
        )
    return current


class _CurrentRows:
    """The rows of the call of one model that runs in this thread, and of the calls around it.

    A model may call itself, unless it is compiled. The signature is that of the model's own
    forward: tools exchange it for one of `*args`.
    """

    def __init__(self, timestep_argument: str, signature: inspect.Signature) -> None:
        self.timestep_argument, self.signature = timestep_argument, signature
        self._local = threading.local()

    def __reduce__(self) -> tuple[type["_CurrentRows"], tuple[str, inspect.Signature]]:
        # Copies and pickles start empty: what a thread computes is no part of the model.
        return _CurrentRows, (self.timestep_argument, self.signature)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        around = self._outside_of_compilation()
        # Before anything can fail, for `end` is called after an error, too.
        self._local.calls = None, around
        timestep = bind_timestep(self.signature, self.timestep_argument, args, kwargs)
        try:
            self._local.calls = scale_bank(model)(timestep), around
        except CalibrationError as error:
            # Whether it matters, the quantizers know: a framework may have switched them off.
            self._local.calls = error, around

    def end(self, *_: Any) -> None:
        calls = self._outside_of_compilation()
        self._local.calls = None if calls is None else calls[1]

    def take(self) -> Rows:
        calls = self._calls()
        if calls is None or calls[0] is None:
            raise TimestepError(
                "A quantizer ran outside of a call of its model, so its timestep is unknown. Call "
                "the attached model itself, with its timestep; a part of it runs within "
                "tdq_plugin.hooks.at_timestep, and activation checkpointing needs "
                "tdq_plugin.hooks.checkpoint_contexts."
            )
        if isinstance(calls[0], CalibrationError):
            raise calls[0]
        return calls[0]

    @contextmanager
    def given(self, rows: Rows) -> Iterator[None]:
        around = self._calls()
        self._local.calls = rows, around
        try:
            yield
        finally:
            self._local.calls = around

    def _outside_of_compilation(self) -> _Calls:
        # Compiled, what was before a call would be a guard, and the second call would recompile.
        return None if torch.compiler.is_compiling() else self._calls()

    def _calls(self) -> _Calls:
        calls: _Calls = getattr(self._local, "calls", None)
        return calls


class ScaleRow:
    """Gives one quantizer its scale and zero point in the call that runs.

    As a forward pre-hook of the quantizer, it adds them to the arguments.
    """

    def __init__(self, current: _CurrentRows, row: int) -> None:
        self._current, self.row = current, row

    def take(self) -> Rows:
        """Scale and zero point, shape `(B,)` each.

        Raises:
            TimestepError: No call of the model is running.
            CalibrationError: The bank has no scales yet.
        """
        scales, zero_points = self._current.take()
        return scales[self.row], zero_points[self.row]

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args, *self.take())
