"""What is float32: modules that stay so in a model of lower precision, and whole models."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tdq_plugin.errors import AdapterError

__all__ = ["Float32Module", "require_float32"]


class Float32Module(nn.Module):
    """Moves between devices as any module; `half()`, `bfloat16()` and `double()` leave it float32.

    A bfloat16 scale is wrong by 0.4 %, a small float16 scale is 0, and bfloat16 cannot tell the
    timestep 999 from 1000.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Float32Module":
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if tensor.is_floating_point() and moved.dtype != tensor.dtype:
                return tensor.to(moved.device)
            return moved

        super()._apply(keep_float32, recurse)  # type: ignore[no-untyped-call]
        return self


def require_float32(model: nn.Module, product: str) -> None:
    """Check the precision of a model whose quantizers become plain operators.

    Args:
        model: The model.
        product: What it becomes a part of, for the message.

    Raises:
        AdapterError: One of its parameters is of another precision.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise AdapterError(
                f"{name!r} is {parameter.dtype}, and the quantizers of the {product} take float32. "
                "Call model.float(); a traced or exported graph may cast by itself, then quantize "
                "the model anew after model.float()."
            )
