"""Convolutions and linear layers on onednn's integer kernels."""

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tdq_plugin.deploy.activations import Codes
from tdq_plugin.deploy.halves import (
    add_halves,
    has_32_bit_sums,
    in_halves,
    leaves_16_bits,
)
from tdq_plugin.fake_quantize import per_sample

__all__ = ["Int8Conv", "Int8Layer", "Int8Linear"]

# Float output of unit scale, and no operation after the product.
_FLOAT_OUTPUT: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")


class PackedWeight(NamedTuple):
    """What the kernel takes of a weight.

    Attributes:
        codes: In the kernel's own layout.
        scale: Float32, shape `(output channels,)`.
        zero_point: Zeros, int32, same shape.
        in_halves: Whether there are twice as many output channels, see `halves`.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    in_halves: bool


class Int8Layer(nn.Module):
    """A layer with int8 weights and float bias that takes `Codes` and gives float32.

    Args:
        codes: Int8 weight codes, shape of the weight.
        weight_scale: Float32, shape `(output channels,)`.
        bias: Float32, shape `(output channels,)`, or None.

    Attributes:
        largest_code: Of the activations, uint8.
        geometry: What the kernel takes of a convolution besides its weight.
        groups: Of the channels.
        channels: The dimension of the output's channels.
    """

    codes: Tensor
    weight_scale: Tensor
    unit_scale: Tensor
    bias: Tensor | None
    geometry: tuple[Any, ...] = ()
    groups = 1
    channels = -1

    def __init__(self, codes: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("weight_scale", weight_scale.detach().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("unit_scale", torch.ones(()), persistent=False)
        self.largest_code = 255
        self._packed: PackedWeight | None = None

    def forward(self, x: Codes) -> Tensor:
        """Multiply.

        Args:
            x: Codes with one scale, or with one per sample.
        """
        values, scale, zero_point = x
        if scale.dim() == 0:
            return self.multiply(values, scale, zero_point, self.bias)
        if zero_point.dim() == 0:
            return self._multiply_by_sample(values, scale, zero_point)
        # The kernel takes one zero point a call.
        parts = zip(values.tensor_split(len(scale)), scale, zero_point, strict=True)
        return torch.cat([self.multiply(v, s, z, self.bias) for v, s, z in parts])

    def _multiply_by_sample(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        # W Q(x; s) + b = s (W codes) + b: one call with scale 1 serves every sample.
        product = self.multiply(values, self.unit_scale, zero_point, None)
        scales = per_sample(scale, product)
        if self.bias is None:
            return product.mul_(scales)
        return torch.addcmul(self.bias_like(product), product, scales)

    def multiply(
        self, values: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None
    ) -> Tensor:
        """The layer for a scale and zero point of shape `()`."""
        *weight, halves = self.packed_weight
        operands = values, scale, zero_point, *weight
        if not halves:
            return self.kernel(*operands, bias, *self.geometry, *_FLOAT_OUTPUT)
        output = self.kernel(*operands, None, *self.geometry, *_FLOAT_OUTPUT)
        output = add_halves(output, self.groups, self.channels % output.dim())
        return output if bias is None else output.add_(self.bias_like(output))

    @property
    @abstractmethod
    def kernel(self) -> Callable[..., Tensor]:
        """The integer kernel."""

    @abstractmethod
    def bias_like(self, product: Tensor) -> Tensor:
        """The bias, shaped so that it broadcasts over the layer's output."""

    @abstractmethod
    def pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Codes in the kernel's own layout."""

    @property
    def packed_weight(self) -> PackedWeight:
        """The packed weight, made at the first call."""
        if self._packed is None:
            codes, scale = self.codes, self.weight_scale
            halves = leaves_16_bits(codes, self.largest_code) and not has_32_bit_sums()
            if halves:
                codes, scale = in_halves(codes, scale, self.groups)
            zero_point = torch.zeros(len(codes), dtype=torch.int32)
            self._packed = PackedWeight(self.pack(codes, scale), scale, zero_point, halves)
        return self._packed

    def __getstate__(self) -> dict[str, Any]:
        # A packed tensor has no storage that could be copied.
        return {**self.__dict__, "_packed": None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._packed = None
        super()._load_from_state_dict(*args, **kwargs)


class Int8Conv(Int8Layer):
    """`nn.Conv1d` or `nn.Conv2d` with zero padding.

    Args:
        codes: As in `Int8Layer`.
        weight_scale: As in `Int8Layer`.
        layer: The convolution whose geometry and bias are taken.
    """

    channels = 1

    def __init__(self, codes: Tensor, weight_scale: Tensor, layer: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__(codes, weight_scale, layer.bias)
        assert not isinstance(layer.padding, str)
        self.geometry = (
            list(layer.stride),
            list(layer.padding),
            list(layer.dilation),
            layer.groups,
        )
        self.groups = layer.groups

    @property
    def kernel(self) -> Callable[..., Tensor]:
        operator: Callable[..., Tensor] = torch.ops.onednn.qconv_pointwise.tensor
        return operator

    def bias_like(self, product: Tensor) -> Tensor:
        assert self.bias is not None
        return self.bias.reshape(-1, *[1] * (product.dim() - 2))

    def pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        # The activation's scale and zero point arrive with every call; these stand in for them.
        packed: Tensor = torch.ops.onednn.qconv_prepack(
            codes, scale, 1.0, 128, *self.geometry, None
        )
        return packed


class Int8Linear(Int8Layer):
    """`nn.Linear`; arguments as in `Int8Layer`."""

    @property
    def kernel(self) -> Callable[..., Tensor]:
        operator: Callable[..., Tensor] = torch.ops.onednn.qlinear_pointwise.tensor
        return operator

    def bias_like(self, product: Tensor) -> Tensor:
        assert self.bias is not None
        return self.bias

    def pack(self, codes: Tensor, scale: Tensor) -> Tensor:
        packed: Tensor = torch.ops.onednn.qlinear_prepack(codes, None)
        return packed
