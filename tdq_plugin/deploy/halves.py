"""Weights of 8 bits on x86 CPUs without VNNI.

Their int8 kernels add pairs of products in 16 bits and cut the sum off: two products of 255 and 127
do not fit. Such a weight is multiplied in two parts, `codes = 2 * high + low`, which do.
"""

from functools import cache

import torch
from torch import Tensor

__all__ = ["add_halves", "has_32_bit_sums", "in_halves", "leaves_16_bits"]


@cache
def has_32_bit_sums() -> bool:
    """Whether this CPU's int8 kernels add all products in 32 bits."""
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("architecture") != "x86_64":
        return True
    return bool(capabilities.get("avx512_vnni") or capabilities.get("avx_vnni"))


def leaves_16_bits(codes: Tensor, largest_code: int) -> bool:
    """Whether the sum of two products may be too large for 16 bits.

    Args:
        codes: Int8 weight codes.
        largest_code: Of the activations, uint8.

    Example:
        >>> leaves_16_bits(torch.tensor([127], dtype=torch.int8), 255)
        True
        >>> leaves_16_bits(torch.tensor([127], dtype=torch.int8), 15)
        False
    """
    largest = int(codes.int().abs().max()) if codes.numel() else 0
    return 2 * largest * largest_code > torch.iinfo(torch.int16).max


def in_halves(codes: Tensor, scale: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of twice as many output channels, group by group: high parts, low parts.

    Args:
        codes: Int8 weight codes, output channels first.
        scale: Shape `(output channels,)`.
        groups: Of the layer's channels.
    """
    # Rounded down: high parts are -64 to 63, low parts 0 and 1.
    high = codes >> 1
    low = codes - 2 * high
    return _side_by_side(high, low, groups), _side_by_side(2 * scale, scale, groups)


def add_halves(output: Tensor, groups: int, dimension: int) -> Tensor:
    """The layer's output from that of its halves; `dimension` is that of the channels."""
    parts = output.unflatten(dimension, (groups, 2, -1))
    summed: Tensor = parts.sum(dimension + 1).flatten(dimension, dimension + 1)
    return summed


def _side_by_side(high: Tensor, low: Tensor, groups: int) -> Tensor:
    parts = [part.unflatten(0, (groups, -1)) for part in (high, low)]
    return torch.cat(parts, dim=1).flatten(0, 1).contiguous()
