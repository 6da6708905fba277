"""What a timestep is: normalising it, and finding it among a model's arguments."""

import inspect
import math
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from tdq_plugin.errors import TimestepError

__all__ = ["TIMESTEP_NAMES", "as_timesteps", "bind_timestep", "find_timestep_argument"]

TIMESTEP_NAMES = ("timestep", "timesteps", "t")


def as_timesteps(
    timestep: Tensor | float | None, device: torch.device | str | None = None
) -> Tensor:
    """Bring a timestep into the one form that the rest of the package uses.

    Args:
        timestep: A python number, a 0-d tensor, or a 1-d tensor; integer or float.
        device: Where the result lives; by default a tensor stays where it is.

    Returns:
        Float32 tensor of shape `(B,)`, B = 1 for a number or 0-d tensor. float32 always: bfloat16
        cannot tell 999 from 1000.

    Raises:
        TimestepError: The timestep is missing, boolean, complex, not finite, empty, or has more
            than one dimension.

    Example:
        >>> as_timesteps(999)
        tensor([999.])
        >>> as_timesteps(torch.tensor([1, 500])).dtype
        torch.float32
    """
    if isinstance(timestep, Tensor):
        return _check_tensor(timestep).reshape(-1).to(device=device, dtype=torch.float32)
    if timestep is None:
        raise TimestepError("The timestep is None. Pass the timestep of this call to the model.")
    # The last one is for numpy's numbers.
    if isinstance(timestep, bool) or not isinstance(timestep, (int, float, Real)):
        raise TimestepError(
            f"A timestep is a number or a tensor, not {timestep!r} "
            f"of type {type(timestep).__name__}."
        )
    if not math.isfinite(timestep):
        raise TimestepError(f"The timestep {timestep!r} is not finite.")
    return torch.tensor([float(timestep)], dtype=torch.float32, device=device)


def _check_tensor(timestep: Tensor) -> Tensor:
    if timestep.dim() > 1:
        raise TimestepError(
            f"A timestep tensor has shape () or (B,), not {tuple(timestep.shape)}. "
            "Give one timestep per sample."
        )
    if timestep.dtype == torch.bool or timestep.is_complex():
        raise TimestepError(f"A timestep tensor is integer or float, not {timestep.dtype}.")
    if torch.compiler.is_compiling():
        return timestep
    if timestep.numel() == 0:
        raise TimestepError("The timestep tensor is empty. Give one timestep per sample.")
    if timestep.is_floating_point() and not bool(timestep.isfinite().all()):
        raise TimestepError(f"The timestep {timestep.tolist()} is not finite.")
    return timestep


def find_timestep_argument(
    forward: Callable[..., Any] | inspect.Signature, name: str | None = None
) -> str:
    """Find the argument of a model's forward that holds the timestep.

    Args:
        forward: The forward method, or its signature.
        name: The argument's name, if the user gave it; else one of `TIMESTEP_NAMES`.

    Returns:
        The name of the argument.

    Raises:
        TimestepError: There is no such argument.

    Example:
        >>> def forward(sample, timestep): ...
        >>> find_timestep_argument(forward)
        'timestep'
    """
    signature = forward if isinstance(forward, inspect.Signature) else inspect.signature(forward)
    arguments = list(signature.parameters)
    for candidate in (name,) if name is not None else TIMESTEP_NAMES:
        if candidate in arguments:
            return candidate
    wanted = repr(name) if name is not None else " or ".join(map(repr, TIMESTEP_NAMES))
    raise TimestepError(
        f"The model's forward has no argument {wanted}; it has {arguments}. "
        "Name the argument that holds the timestep: timestep_argument='...'."
    )


def bind_timestep(
    signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The value given for argument `name` in a call of a model.

    Raises:
        TimestepError: The call does not give it.
    """
    value = signature.bind_partial(*args, **kwargs).arguments.get(name)
    if value is None:
        raise TimestepError(
            f"The model was called without its timestep argument {name!r}. "
            "A TDQ model needs the timestep of every call."
        )
    return value
