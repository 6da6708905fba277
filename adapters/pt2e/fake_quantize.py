"""torchao's fake-quantize classes: activations by a scale bank, weights by LSQ per channel."""

import torch
from torch import fx
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from tdq_plugin.adapters.fake_quantize_switches import ActivationSwitches, WeightSwitches
from tdq_plugin.errors import ConfigError
from tdq_plugin.graph.decompose import decompose
from tdq_plugin.grid import QuantizationGrid

__all__ = ["TDQFakeQuantize", "TDQWeightFakeQuantize"]

_SYMMETRIC = (torch.per_tensor_symmetric, torch.per_channel_symmetric)


class TDQFakeQuantize(ActivationSwitches, FakeQuantizeBase):
    """Activation fake-quantize for a `QuantizationSpec`; its scale is a row of the scale bank.

    Name it as the `observer_or_fake_quant_ctr` of any quantizer's specification. It keeps no
    running statistics: calibrate with `tdq_plugin.calibrate`. The arguments are those that
    torchao passes from the specification.

    Args:
        dtype: `torch.uint8` or `torch.int8`.
        quant_min: Smallest code, by default that of `dtype`.
        quant_max: Largest code, by default that of `dtype`.
        qscheme: `torch.per_tensor_affine` or `torch.per_tensor_symmetric`.
        is_dynamic: Not supported: input-dependent scales are the mode `dynamic`.

    Raises:
        ConfigError: The specification is dynamic or per channel.

    Example:
        >>> TDQFakeQuantize(torch.uint8, 0, 15).grid.bits
        4
    """

    is_dynamic = False
    ch_axis = -1
    own_convert = "tdq_plugin.adapters.pt2e.convert"

    def __init__(
        self,
        dtype: torch.dtype = torch.uint8,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        is_dynamic: bool = False,
    ) -> None:
        qscheme = qscheme or torch.per_tensor_affine
        if is_dynamic or qscheme not in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            raise ConfigError(
                f"A TDQ activation is static and per tensor, not qscheme={qscheme} with "
                f"is_dynamic={is_dynamic}. Correct the QuantizationSpec."
            )
        super().__init__(_grid(dtype, quant_min, quant_max, qscheme))
        self.dtype, self.qscheme = dtype, qscheme
        self.quant_min, self.quant_max = self.grid.quant_min, self.grid.quant_max

    def convert(self, model: fx.GraphModule, node: fx.Node) -> None:
        """Called by `convert_pt2e`: replace this quantizer by quantize and dequantize operators."""
        decompose(model, node, self)


class TDQWeightFakeQuantize(WeightSwitches, FakeQuantizeBase):
    """Weight fake-quantize for a `QuantizationSpec`: per output channel, LSQ gradients.

    Args:
        dtype: `torch.int8`.
        quant_min: Smallest code, by default that of `dtype`.
        quant_max: Largest code, by default that of `dtype`.
        qscheme: `torch.per_channel_symmetric` or `torch.per_channel_affine`.
        is_dynamic: Not supported.

    Raises:
        ConfigError: The specification is dynamic or per tensor.
    """

    is_dynamic = False
    is_per_channel = True
    ch_axis = 0

    def __init__(
        self,
        dtype: torch.dtype = torch.int8,
        quant_min: int | None = None,
        quant_max: int | None = None,
        qscheme: torch.qscheme | None = None,
        is_dynamic: bool = False,
    ) -> None:
        qscheme = qscheme or torch.per_channel_symmetric
        if is_dynamic or qscheme not in (torch.per_channel_affine, torch.per_channel_symmetric):
            raise ConfigError(
                f"A TDQ weight is static and per channel, not qscheme={qscheme} with "
                f"is_dynamic={is_dynamic}. Correct the QuantizationSpec."
            )
        super().__init__(_grid(dtype, quant_min, quant_max, qscheme))
        self.dtype, self.qscheme = dtype, qscheme
        self.quant_min, self.quant_max = self.grid.quant_min, self.grid.quant_max


def _grid(
    dtype: torch.dtype, quant_min: int | None, quant_max: int | None, qscheme: torch.qscheme
) -> QuantizationGrid:
    codes = torch.iinfo(dtype)
    low = codes.min if quant_min is None else quant_min
    high = codes.max if quant_max is None else quant_max
    return QuantizationGrid(low, high, symmetric=qscheme in _SYMMETRIC)
