"""The weight quantizer that every adapter uses: one learned scale per output channel."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.errors import CalibrationError
from tdq_plugin.fake_quantize import fake_quantize, quantize
from tdq_plugin.float32 import Float32Module
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.pseudo_quantize import pseudo_quantize
from tdq_plugin.ranges import RangeMethod, search_range
from tdq_plugin.scales.bank import SCALE_FLOOR

__all__ = ["WeightQuantizer", "follow_loaded_weight"]


class WeightQuantizer(Float32Module):
    """Fake quantization of a weight along its output channels, with LSQ gradients.

    Args:
        grid: The integer codes.

    Attributes:
        base_scale: Where training starts, shape `(output channels,)`; empty until `initialise` or
            a state dict sets it.
        zero_point: The code of zero, constant, integer valued, shape `(output channels,)`; all 0 on
            a symmetric grid.
        log_ratio: Learned; `scale = base_scale * exp(log_ratio)`. A plain scale of 1e-3 would be
            wrecked by a single Adam step at an ordinary learning rate.
        enabled: Whether the weight is quantized.
        noise_in_training: Add NIPQ's noise instead of rounding while the module is in training
            mode.
    """

    base_scale: Tensor
    zero_point: Tensor

    def __init__(self, grid: QuantizationGrid) -> None:
        super().__init__()
        self.grid = grid
        self.register_buffer("base_scale", torch.empty(0))
        self.register_buffer("zero_point", torch.empty(0))
        self.log_ratio = nn.Parameter(torch.empty(0))
        self.enabled = True
        self.noise_in_training = False
        # How the ranges came from the weight, if they did and no state dict brought them.
        self._method: RangeMethod | None = None

    @property
    def scale(self) -> Tensor:
        """The scales, shape `(output channels,)`; empty if they were never set."""
        return (self.base_scale * self.log_ratio.exp()).clamp(min=SCALE_FLOOR)

    def initialise(self, weight: Tensor, method: RangeMethod = "mse") -> None:
        """Set the ranges from a weight `(output channels, ...)`; `mse` is the optimal clipping."""
        self.set_scale(*search_range(weight.detach().flatten(1).float(), self.grid, method))
        self._method = method

    def initialise_anew(self, weight: Tensor) -> None:
        """Set the ranges from another weight, unless they were given, restored or trained."""
        if self._method is not None and not bool(self.log_ratio.any()):
            self.initialise(weight, self._method)

    def set_scale(self, scale: Tensor, zero_point: Tensor | None = None) -> None:
        """Start from given scales, positive, and zero points, 0 if none are given."""
        self.base_scale = scale
        self.zero_point = torch.zeros_like(scale) if zero_point is None else zero_point
        self.log_ratio.data = torch.zeros_like(scale)
        self._method = None

    def forward(self, weight: Tensor) -> Tensor:
        """Quantize and dequantize a weight."""
        if not self.enabled:
            return weight
        scale = self.positive_scale()
        noisy = self.noise_in_training and self.training
        return (pseudo_quantize if noisy else fake_quantize)(
            weight, scale, self.zero_point, self.grid.quant_min, self.grid.quant_max
        )

    def codes(self, weight: Tensor) -> Tensor:
        """The integer codes of a weight, int8."""
        scale = self.positive_scale().detach()
        codes = quantize(
            weight.detach().float(),
            scale,
            self.zero_point,
            self.grid.quant_min,
            self.grid.quant_max,
        )
        return codes.to(torch.int8)

    def positive_scale(self) -> Tensor:
        """The scales.

        Raises:
            CalibrationError: They were never set.
        """
        if self.scale.numel() == 0:
            raise CalibrationError(
                "A weight quantizer has no scale yet. Call tdq_plugin.attach(model), which sets "
                "it from the weight, or load a state dict."
            )
        return self.scale

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):  # type: ignore[no-untyped-def]
        saved = state_dict.get(prefix + "base_scale")
        if saved is not None:
            # Before there were zero points, all weights were symmetric.
            state_dict.setdefault(prefix + "zero_point", torch.zeros_like(saved))
            if self.base_scale.shape != saved.shape:
                self.set_scale(self.base_scale.new_ones(saved.shape))
            self._method = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def follow_loaded_weight(owner: nn.Module, weight: str, quantizer: str) -> None:
    """Let a state dict of float weights renew the ranges that came from the weight before.

    Frameworks prepare a model first and load what was trained in float then. A state dict that has
    the quantizer's own scales restores those.

    Args:
        owner: The module whose state dict has the weight.
        weight: Path of the weight in it.
        quantizer: Path of the weight's quantizer in it.
    """
    owner.register_load_state_dict_pre_hook(partial(_renew, weight, quantizer))


def _renew(
    weight: str,
    quantizer: str,
    owner: nn.Module,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    *_: Any,
) -> None:
    loaded, module = state_dict.get(prefix + weight), owner.get_submodule(quantizer)
    restored = f"{prefix}{quantizer}.base_scale" in state_dict
    # Reconstruction puts another module there for a while.
    if loaded is None or restored or not isinstance(module, WeightQuantizer):
        return
    current = owner.get_parameter(weight)
    # Of another shape, it is an error that `load_state_dict` reports.
    if loaded.shape == current.shape:
        module.initialise_anew(loaded.to(current))
