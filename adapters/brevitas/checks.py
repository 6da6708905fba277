"""What cannot have a scale for each sample, or fails in Brevitas, and is refused by `attach`."""

from typing import Any

from brevitas.nn.mixin.base import QuantRecurrentLayerMixin
from brevitas.nn.quant_layer import QuantWeightBiasInputOutputLayer
from torch import nn

from tdq_plugin.adapters.brevitas.proxy import TDQActQuantProxy
from tdq_plugin.errors import AdapterError

__all__ = ["check_layers"]


def check_layers(model: nn.Module) -> None:
    """Look at every layer that has a TDQ quantizer of its own, and at the weights of all.

    Raises:
        AdapterError: One returns a `QuantTensor`, its bias takes the scale of the input, it is a
            part of a recurrent layer or a `TransformerEncoderLayer`, or Brevitas cannot quantize
            its weight.
    """
    for path, layer in model.named_modules():
        if isinstance(layer, QuantWeightBiasInputOutputLayer) and _has_channels_in_groups(layer):
            raise AdapterError(
                f"{path!r} is a transposed convolution with groups={layer.groups} and a weight "
                "scale for each channel, which Brevitas cannot compute. Give it weight_quant="
                f"Int8WeightPerTensorFloat, or leave it float: float_layers=[{path!r}]."
            )
        if isinstance(layer, nn.TransformerEncoderLayer) and _has_tdq(layer):
            raise AdapterError(
                f"{path!r} is a TransformerEncoderLayer, which in evaluation computes with the "
                "weights of its layers instead of calling them. Let all of it stay float: "
                f"float_layers=[{path!r}]."
            )
        if isinstance(layer, QuantRecurrentLayerMixin) and _has_tdq(layer):
            raise AdapterError(
                f"{path!r} is a {type(layer).__name__}, whose quantizers do not see samples along "
                "one dimension. Leave its quantizers to Brevitas."
            )
        if not any(isinstance(child, TDQActQuantProxy) for child in layer.children()):
            continue
        if getattr(layer, "return_quant_tensor", False):
            raise AdapterError(
                f"{path!r} has return_quant_tensor=True. Brevitas computes with one scale per "
                "tensor or channel, and a TDQ activation has one for each sample of a batch. "
                "Set return_quant_tensor=False."
            )
        if _takes_scale_of_input(layer):
            raise AdapterError(
                f"The bias quantizer of {path!r} takes its scale from the input, which has one for "
                "each sample of a batch. Set bias_quant=None, or "
                "Int8BiasPerTensorFloatInternalScaling."
            )


def _has_tdq(layer: nn.Module) -> bool:
    return any(isinstance(module, TDQActQuantProxy) for module in layer.modules())


def _has_channels_in_groups(layer: Any) -> bool:
    """Brevitas has a scale for each output channel, and the weight has those of one group."""
    if not getattr(layer, "transposed", False) or layer.groups == 1:
        return False
    weights = layer.weight_quant
    return bool(weights.is_quant_enabled and weights.quant_injector.scaling_shape != ())


def _takes_scale_of_input(layer: nn.Module) -> bool:
    bias = getattr(layer, "bias_quant", None)
    if bias is None or not bias.is_quant_enabled or not bias.requires_input_scale:
        return False
    return isinstance(layer.input_quant, TDQActQuantProxy)
