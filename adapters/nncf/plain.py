"""Quantizers made of torch's own operators, which tracers, exporters and OpenVINO know."""

import numpy as np
import torch
from nncf.torch.quantization.layers import BaseQuantizer
from torch import Tensor, nn

from tdq_plugin.adapters.nncf.quantizer import TDQQuantizer

__all__ = ["FakeQuantizeWeight", "Ratios", "RescaledFakeQuantize"]


class Ratios:
    """The ratios g of the call of a stripped model that runs, and their reciprocals; `(L,)` each.

    A plain holder: the quantizers are called by NNCF's hooks, which give them a tensor only, and
    which cannot run in two threads at once.
    """

    def __init__(self) -> None:
        self.now: tuple[Tensor, Tensor] | None = None


class RescaledFakeQuantize(nn.Module):
    """`g * FakeQuantize(x / g)`: the fake quantization is the same for all timesteps.

    Args:
        quantizer: Its name and its grid are taken.
        scale: The step of the fake quantization.
        zero_point: The code of zero.
        row: Its row among the ratios; None if g is 1 for all timesteps.
        ratios: Where the stripped model puts the ratios.
    """

    def __init__(
        self,
        quantizer: TDQQuantizer,
        scale: float,
        zero_point: int,
        row: int | None,
        ratios: Ratios,
    ) -> None:
        super().__init__()
        self.scale, self.zero_point = scale, zero_point
        self.quant_min, self.quant_max = quantizer.grid.quant_min, quantizer.grid.quant_max
        self.name, self.row, self.ratios = quantizer.name, row, ratios

    def forward(self, x: Tensor) -> Tensor:
        if self.row is None:
            return self._quantize(x)
        assert self.ratios.now is not None
        ratios, reciprocals = self.ratios.now
        return self._quantize(x * reciprocals[self.row]) * ratios[self.row]

    def _quantize(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max
        )


class FakeQuantizeWeight(nn.Module):
    """A weight quantizer of NNCF as it is now, per tensor or per channel.

    Args:
        native: NNCF's quantizer.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, native: BaseQuantizer) -> None:
        super().__init__()
        # The limits that come with them are those of the widest grid, which a weight never uses.
        _, _, scale, zero_point = native.get_parameters_for_torch_fq()
        self.register_buffer("scale", scale.detach().clone())
        self.register_buffer("zero_point", zero_point.to(torch.int32))
        self.axis = int(np.argmax(native.scale_shape))
        self.quant_min, self.quant_max = native.level_low, native.level_high

    def forward(self, weight: Tensor) -> Tensor:
        codes = self.quant_min, self.quant_max
        if self.scale.numel() == 1:
            scale, zero_point = self.scale[0], self.zero_point[0]
            return torch.fake_quantize_per_tensor_affine(weight, scale, zero_point, *codes)
        return torch.fake_quantize_per_channel_affine(
            weight, self.scale, self.zero_point, self.axis, *codes
        )
