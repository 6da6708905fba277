"""What a denoiser returns, in whatever form."""

from typing import Any

from torch import Tensor

__all__ = ["first_tensor"]


def first_tensor(output: Any) -> Tensor:
    """What a denoiser predicts: its output, or the first of several.

    Args:
        output: A tensor, a tuple, or a diffusers output.

    Example:
        >>> import torch
        >>> first_tensor((torch.tensor(1.0), None))
        tensor(1.)
    """
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor
