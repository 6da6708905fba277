"""NNCF's activation quantizer with a scale that a scale bank gives: `g(t) * Q(x / g(t))`."""

from dataclasses import asdict
from typing import Any

import torch
from nncf.torch.layer_utils import StatefulModuleInterface
from nncf.torch.quantization.layers import AsymmetricQuantizer, BaseQuantizer, SymmetricQuantizer
from nncf.torch.quantization.quantize_functions import QuantizeAsymmetric, TuneRange
from torch import Tensor

from tdq_plugin.errors import AdapterError
from tdq_plugin.fake_quantize import StepGradient, per_sample
from tdq_plugin.float32 import Float32Module
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.quantizer import ActivationQuantizer

__all__ = ["TDQQuantizer", "is_traced"]


def is_traced() -> bool:
    """Whether the call that runs is recorded by a tracer, an exporter or a compiler of torch."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_compiling()


class TDQQuantizer(Float32Module, ActivationQuantizer, StatefulModuleInterface):
    """A hook in NNCF's storage: NNCF's own rounding around a static range, rescaled by t.

    With a scale of `g * static_scale` it computes `g * Q(x / g)`, where Q is what NNCF computes
    for the static range; at g = 1 the values are NNCF's own, bit for bit, if its range has a code
    for zero. The gradients are those of `tdq_plugin.fake_quantize`.

    Args:
        grid: The integer codes.
        name: The quantizer's row in the scale bank.
        order: Its place in the order of execution.

    Attributes:
        static_low: Smallest value of NNCF's range, 0-d.
        static_range: Width of NNCF's range, 0-d.
    """

    static_low: Tensor
    static_range: Tensor

    def __init__(self, grid: QuantizationGrid, name: str, order: int) -> None:
        super().__init__(grid)
        self.name, self.order = name, order
        self.register_buffer("static_low", torch.zeros(()))
        self.register_buffer("static_range", torch.ones(()))

    @classmethod
    def from_native(cls, native: BaseQuantizer, name: str, order: int) -> "TDQQuantizer":
        """The quantizer with the range and the grid of NNCF's."""
        symmetric = isinstance(native, SymmetricQuantizer)
        grid = QuantizationGrid(native.level_low, native.level_high, symmetric)
        quantizer = cls(grid, name, order).to(native.enabled.device)
        with torch.no_grad():
            low, width = _range(native)
            quantizer.static_low.copy_(low.reshape(()))
            quantizer.static_range.copy_(width.reshape(()))
        return quantizer

    @property
    def static_scale(self) -> Tensor:
        """The step of NNCF's range, 0-d."""
        return self.static_range / (self.grid.quant_max - self.grid.quant_min)

    @property
    def static_zero_point(self) -> Tensor:
        """The code of zero in NNCF's range, 0-d."""
        return (self.grid.quant_min - self.static_low / self.static_scale).round()

    def forward(
        self, x: Tensor, scale: Tensor | None = None, zero_point: Tensor | None = None
    ) -> Tensor:
        # NNCF intercepts every operation of torch in a call of the model, to find its hooks.
        with torch._C.DisableTorchFunction():
            return super().forward(x, scale, zero_point)

    def round(self, x: Tensor, scale: Tensor, zero_point: Tensor, gradient: StepGradient) -> Tensor:
        if is_traced():
            raise AdapterError(
                "NNCF's quantizers cannot be traced, exported or compiled: their kernels are no "
                "operators of torch. Call tdq_plugin.adapters.nncf.strip(model) first."
            )
        with torch.no_grad():
            value = self._native(x, scale, zero_point)
        if not torch.is_grad_enabled():
            return value
        estimate = super().round(x, scale, zero_point, gradient)
        output: Tensor = _ValueOf.apply(estimate, value)  # type: ignore[no-untyped-call]
        return output

    def _native(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        static_scale = self.static_scale
        ratio, zero = per_sample(scale, x) / static_scale, per_sample(zero_point, x)
        low = self.static_low + (self.static_zero_point - zero) * static_scale
        levels = self.grid.quant_max - self.grid.quant_min + 1
        wide = x.to(torch.promote_types(x.dtype, ratio.dtype))
        value: Tensor = QuantizeAsymmetric.apply(
            wide / ratio, low, self.static_range.expand_as(low), 0, levels - 1, levels
        )
        return (value * ratio).to(x.dtype)

    def get_config(self) -> dict[str, Any]:
        """What `nncf.torch.get_config` saves; JSON."""
        return {
            "grid": asdict(self.grid),
            "name": self.name,
            "order": self.order,
            "mode": self.mode,
            "estimator": self.estimator,
        }

    @classmethod
    def from_config(cls, state: dict[str, Any]) -> "TDQQuantizer":
        """The quantizer that `nncf.torch.load_from_config` makes."""
        quantizer = cls(QuantizationGrid(**state["grid"]), state["name"], state["order"])
        # Older files have neither.
        quantizer.mode = state.get("mode", quantizer.mode)
        quantizer.estimator = state.get("estimator", quantizer.estimator)
        return quantizer


def _range(native: BaseQuantizer) -> tuple[Tensor, Tensor]:
    """Lower limit and width of the values that NNCF's quantizer gives, as it computes them."""
    if isinstance(native, SymmetricQuantizer):
        high = native.scale.abs() + native.eps
        low = high * (native.level_low / native.level_high)
        return low, high - low
    assert isinstance(native, AsymmetricQuantizer)
    low, width = TuneRange.apply(
        native.input_low, native.input_range.abs() + native.eps, native.levels
    )
    # NNCF makes zero a code by this, but not where it lies within half a step of a limit.
    last = native.levels - 1
    zero_point = (-low * last / width).round()
    high = torch.where(zero_point == last, 0, low + width)
    aligned_low = torch.where(zero_point == 0, 0, low)
    is_edge = (zero_point == 0) | (zero_point == last)
    return aligned_low, torch.where(is_edge, high - aligned_low, width)


class _ValueOf(torch.autograd.Function):
    """The second argument's value with the first one's gradient."""

    @staticmethod
    def forward(ctx: Any, estimate: Tensor, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
