"""Fourier encodings of the timestep: what a generator sees."""

import math

import torch
from torch import Tensor

__all__ = ["band_limited_frequencies", "fourier_encoding", "geometric_frequencies"]


def geometric_frequencies(dimension: int, t_max: float = 10000.0) -> Tensor:
    """Angular frequencies `t_max ** (-2 i / dimension)` (TDQ, eq. 6); shape `(dimension / 2,)`."""
    index = torch.arange(dimension // 2, dtype=torch.float32)
    return torch.exp(index * (-math.log(t_max) / (dimension // 2)))


def band_limited_frequencies(
    dimension: int, timesteps: int, lowest: float = 0.25, highest: float = 4.0
) -> Tensor:
    """Frequencies from `lowest` to `highest` cycles over `timesteps`; shape `(dimension / 2,)`.

    Without a fast sine of t, a learned scale stays smooth between the timesteps it was trained
    on. The geometric encoding has such sines.
    """
    cycles = torch.logspace(
        math.log2(lowest), math.log2(highest), dimension // 2, base=2.0, dtype=torch.float32
    )
    return cycles * (2 * math.pi / timesteps)


def fourier_encoding(timesteps: Tensor, frequencies: Tensor) -> Tensor:
    """Sines and cosines of each timestep.

    Args:
        timesteps: Float32, shape `(B,)`.
        frequencies: Radians a timestep, shape `(D / 2,)`.

    Returns:
        Shape `(B, D)`, sines first.

    Example:
        >>> fourier_encoding(torch.zeros(1), geometric_frequencies(4))
        tensor([[0., 0., 1., 1.]])
    """
    angles = timesteps[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
