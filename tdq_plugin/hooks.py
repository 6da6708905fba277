"""The road of the scales where there is no graph: from the model's call to its quantizers.

A hook on the model reads the timestep of each call, evaluates the scale bank once, and a hook on
each quantizer hands it its row. Frameworks that replace modules share this road.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from tdq_plugin.attach import named_quantizers, scale_bank
from tdq_plugin.errors import AdapterError, TimestepError
from tdq_plugin.timestep import bind_timestep, find_timestep_argument

__all__ = ["checkpoint_contexts", "connect_rows"]

Rows = tuple[Tensor, Tensor]


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
    name = find_timestep_argument(model.forward, timestep_argument)
    current = _CurrentRows(name)
    model.register_forward_pre_hook(current.begin, with_kwargs=True)
    model.register_forward_hook(current.end, always_call=True)
    for row, (_, quantizer) in enumerate(named_quantizers(model)):
        quantizer.register_forward_pre_hook(_Row(current, row))


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
    owners = [getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values()]
    current = next((owner for owner in owners if isinstance(owner, _CurrentRows)), None)
    if current is None:
        raise AdapterError(
            f"This {type(model).__name__} has no scale hooks. Give the model that was attached; "
            "a graph needs no such context."
        )
    return nullcontext(), current.given(current.take())


class _CurrentRows:
    """The rows of the call of one model that runs in this thread; None between calls."""

    def __init__(self, timestep_argument: str) -> None:
        self.timestep_argument = timestep_argument
        self._local = threading.local()

    def __reduce__(self) -> tuple[Callable[[str], "_CurrentRows"], tuple[str]]:
        # Copies and pickles start empty: what a thread computes is no part of the model.
        return _CurrentRows, (self.timestep_argument,)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._local.rows = None
        signature = inspect.signature(model.forward)
        timestep = bind_timestep(signature, self.timestep_argument, args, kwargs)
        self._local.rows = scale_bank(model)(timestep)

    def end(self, *_: Any) -> None:
        self._local.rows = None

    def take(self) -> Rows:
        rows: Rows | None = getattr(self._local, "rows", None)
        if rows is None:
            raise TimestepError(
                "A quantizer ran outside of a call of its model, so its timestep is unknown. Call "
                "the attached model itself, with its timestep; activation checkpointing needs "
                "tdq_plugin.hooks.checkpoint_contexts."
            )
        return rows

    @contextmanager
    def given(self, rows: Rows) -> Iterator[None]:
        previous = getattr(self._local, "rows", None)
        self._local.rows = rows
        try:
            yield
        finally:
            self._local.rows = previous


class _Row:
    """Hook of one quantizer: adds its scale and zero point to the arguments."""

    def __init__(self, current: _CurrentRows, row: int) -> None:
        self.current, self.row = current, row

    def __call__(self, quantizer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        scales, zero_points = self.current.take()
        return (*args, scales[self.row], zero_points[self.row])
