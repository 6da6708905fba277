"""How a scale bank is attached to a model with Brevitas layers."""

from collections.abc import Iterator

import torch
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import nn

from tdq_plugin.adapters.brevitas.calibration import CalibrationMode
from tdq_plugin.adapters.brevitas.checks import check_layers
from tdq_plugin.adapters.brevitas.proxy import TDQActQuantProxy
from tdq_plugin.adapters.brevitas.tensor_quant import TDQTensorQuant
from tdq_plugin.hooks import scale_rows
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.registry import register_adapter

__all__ = ["BrevitasAdapter"]


@register_adapter("brevitas")
class BrevitasAdapter:
    """Models with TDQ quantizers in their Brevitas layers, however those came there."""

    @staticmethod
    def covers(model: nn.Module) -> bool:
        return any(isinstance(module, TDQActQuantProxy) for module in model.modules())

    @staticmethod
    def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
        check_layers(model)
        _initialise_weights(model)
        return {name: tensor_quant.quantizer for name, tensor_quant in _tensor_quants(model)}

    @staticmethod
    def connect(model: nn.Module, timestep_argument: str | None) -> None:
        rows = scale_rows(model, timestep_argument)
        for row, (_, tensor_quant) in zip(rows, _tensor_quants(model), strict=True):
            tensor_quant.row = row
        model.tdq_calibration = CalibrationMode(model)


@torch.no_grad()
def _initialise_weights(model: nn.Module) -> None:
    """Let learned weight scales take their first values, which Brevitas does in the first call.

    Until then, a copy of some of its weight quantizers still works on the original.
    """
    for layer in model.modules():
        if isinstance(layer, QuantWeightBiasInputOutputLayer):
            proxy = layer.weight_quant
            if proxy.is_quant_enabled and not proxy.requires_quant_input:
                layer.quant_weight()


def _tensor_quants(model: nn.Module) -> Iterator[tuple[str, TDQTensorQuant]]:
    """Every quantizer once, named by the first layer that it serves: `conv_in.input`."""
    for path, module in model.named_modules():
        if isinstance(module, TDQActQuantProxy):
            yield path.removesuffix("_quant"), module.tdq_tensor_quant
