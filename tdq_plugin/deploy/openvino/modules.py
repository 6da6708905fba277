"""What the modules of an int8 graph become, so that OpenVINO reads constant quantizers in them."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tdq_plugin.deploy.layers import Int8Conv, Int8Layer
from tdq_plugin.deploy.timestep_values import TimestepValues
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.scales.frozen import FrozenBank

__all__ = ["IntegerWeightLayer", "Ratio", "RatioLookup", "RescaledQuantizer"]


class Ratio(NamedTuple):
    """What the timestep does to one scale: `scale(t) = base_scale * ratio(t)`.

    Attributes:
        ratio: Shape `(N, 1)`, N = 1 or the batch size.
        reciprocal: `1 / ratio`, same shape.
    """

    ratio: Tensor
    reciprocal: Tensor


class RatioLookup(nn.Module):
    """The one module that sees the timestep: it takes the place of `TimestepLookup`.

    Args:
        bank: The table, with constant zero points.
        values: The tabulated timestep path, if it is cached.

    Attributes:
        base_scale: A constant scale per quantizer, the median over the timesteps, shape `(L,)`.
    """

    base_scale: Tensor
    middles: Tensor
    table: Tensor

    def __init__(self, bank: FrozenBank, values: TimestepValues | None) -> None:
        super().__init__()
        steps, self.values = bank.timesteps, values
        self.register_buffer("base_scale", bank.scales.median(dim=0).values)
        ratios = bank.scales.double() / self.base_scale.double()
        self.register_buffer("table", torch.cat([ratios, 1 / ratios], dim=1).float())
        self.register_buffer("middles", (steps[1:] + steps[:-1]) / 2)

    def forward(self, timesteps: Tensor, sample: Tensor) -> tuple[list[Ratio], list[Tensor]]:
        """Look timesteps up that are known to be in the table.

        Args:
            timesteps: Float32, shape `(N,)`.
            sample: The model's input; its dimension 0 is the batch.

        Returns:
            A ratio per quantizer, and the cached values.
        """
        # Comparisons instead of a search: the row whose timestep is the nearest.
        index = (timesteps[:, None] > self.middles).sum(dim=1)
        # One gather and views of its columns; a gather per quantizer takes 1.5 % of a UNet's time.
        columns = self.table.index_select(0, index).split(1, dim=1)
        quantizers = len(columns) // 2
        rows = list(map(Ratio, columns[:quantizers], columns[quantizers:]))
        return rows, self.values(index, sample.shape[0]) if self.values is not None else []


class RescaledQuantizer(nn.Module):
    """`ratio * Q(x / ratio)` with a constant quantizer `Q`; exactly `Q` with the scale of t.

    Args:
        name: Its row in the scale table.
        grid: The integer codes.
        base_scale: The scale of `Q`.
        zero_point: The zero point of `Q`.
        is_static: The ratio is 1 for every timestep.
        batch_is_leading: Dimension 0 is the batch; else it holds several rows for each sample,
            such as the heads of an attention.
    """

    def __init__(
        self,
        name: str,
        grid: QuantizationGrid,
        base_scale: float,
        zero_point: int,
        is_static: bool,
        batch_is_leading: bool,
    ) -> None:
        super().__init__()
        self.name, self.grid = name, grid
        self.base_scale, self.zero_point = base_scale, zero_point
        self.is_static, self.batch_is_leading = is_static, batch_is_leading

    def forward(self, x: Tensor, row: Ratio) -> Tensor:
        """Quantize and dequantize `x`, samples along dimension 0."""
        if self.is_static:
            return self._quantize(x)
        return self._quantize(x * self._along(row.reciprocal, x)) * self._along(row.ratio, x)

    def _quantize(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(
            x, self.base_scale, self.zero_point, self.grid.quant_min, self.grid.quant_max
        )

    def _along(self, factor: Tensor, x: Tensor) -> Tensor:
        if not self.batch_is_leading:
            factor = factor.expand(-1, x.shape[0] // factor.shape[0])
        return factor.reshape(-1, *[1] * (x.dim() - 1))


class IntegerWeightLayer(nn.Module):
    """A convolution or linear layer on floats whose weight is stored as int8.

    Args:
        layer: The layer of the int8 graph.
    """

    codes: Tensor
    weight_scale: Tensor
    bias: Tensor | None

    def __init__(self, layer: Int8Layer) -> None:
        super().__init__()
        self.geometry = layer.geometry if isinstance(layer, Int8Conv) else None
        shape = (-1, *[1] * (layer.codes.dim() - 1))
        self.register_buffer("codes", layer.codes)
        self.register_buffer("weight_scale", layer.weight_scale.reshape(shape))
        self.register_buffer("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's product, with its bias."""
        weight = self.codes.to(torch.float32) * self.weight_scale
        if self.geometry is None:
            return nn.functional.linear(x, weight, self.bias)
        is_2d = self.codes.dim() == 4
        convolution = nn.functional.conv2d if is_2d else nn.functional.conv1d
        return convolution(x, weight, self.bias, *self.geometry)
