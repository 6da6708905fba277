"""Bits of a weight quantizer of NNCF, whose own configuration knows 8 only."""

import numpy as np
import torch
from nncf.torch.quantization.layers import BaseQuantizer, SymmetricQuantizer
from torch import Tensor

from tdq_plugin.errors import AdapterError
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.ranges import search_range

__all__ = ["weight_quantizer"]


def weight_quantizer(native: BaseQuantizer, weight: Tensor, bits: int) -> BaseQuantizer:
    """NNCF's quantizer of a weight for a number of bits.

    With 8 bits it is the one that NNCF made. With fewer, its range is searched for the least
    squared error: NNCF's, from the largest weight, leaves most of few codes unused.

    Args:
        native: The quantizer that `nncf.quantize` made.
        weight: The weight.
        bits: 2 to 8.

    Raises:
        AdapterError: The quantizer uses half of its range, or has a zero point at fewer bits.
    """
    _check_range(native, weight)
    if native.num_bits == bits:
        return native
    if not isinstance(native, SymmetricQuantizer):
        raise AdapterError(
            f"A weight quantizer is a {type(native).__name__}; only symmetric ones have "
            f"{bits} bits. Call nncf.quantize with tdq_quantize_settings()."
        )
    quantizer = SymmetricQuantizer.from_config({**native.get_config(), "num_bits": bits})
    quantizer.signed = native.signed
    grid = QuantizationGrid(quantizer.level_low, quantizer.level_high, symmetric=True)
    axis = int(np.argmax(native.scale_shape))
    rows = weight.detach().float().movedim(axis, 0).reshape(quantizer.scale.numel(), -1)
    scale, _ = search_range(rows, grid)
    with torch.no_grad():
        quantizer.scale.copy_((scale * grid.quant_max).reshape(native.scale_shape))
    return quantizer.to(weight.device)


def _check_range(native: BaseQuantizer, weight: Tensor) -> None:
    """NNCF's overflow fix for old processors doubles the range of a weight."""
    if isinstance(native, SymmetricQuantizer):
        used = (weight.detach() / native.scale.detach()).abs().max()
        if 0 < used < 0.51:
            raise AdapterError(
                f"The weights use {used:.0%} of the range that NNCF gave them, so the largest lie "
                "exactly between two codes. Call nncf.quantize with "
                "overflow_fix=OverflowFix.DISABLE, as in tdq_quantize_settings()."
            )
