"""Modules that stay float32 in a model of lower precision."""

from collections.abc import Callable

from torch import Tensor, nn

__all__ = ["Float32Module"]


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
