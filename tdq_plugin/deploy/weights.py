"""From a prepared layer to an int8 layer, or to a float layer with its quantized weight."""

from typing import Any

import torch
from torch import nn

from tdq_plugin.deploy.layers import Int8Conv, Int8Layer, Int8Linear
from tdq_plugin.errors import AdapterError
from tdq_plugin.graph.compute import LAYERS
from tdq_plugin.weights import WeightQuantizer

__all__ = ["float_layer", "has_integer_kernel", "int8_layer", "weight_quantizer"]


def weight_quantizer(layer: Any) -> WeightQuantizer | None:
    """The weight quantizer of a layer from `prepare_qat_fx` or `prepare_fx`, if it has one.

    Raises:
        AdapterError: The layer has a weight quantizer of another kind.
    """
    quantizer: Any = getattr(layer, "weight_fake_quant", None)
    if quantizer is None and getattr(layer, "qconfig", None) is not None:
        quantizer = layer.qconfig.weight()
    if quantizer is None or isinstance(quantizer, nn.Identity):
        return None
    if not isinstance(quantizer, WeightQuantizer):
        raise AdapterError(
            f"The weight quantizer of a {type(layer).__name__} is a {type(quantizer).__name__}; "
            "int8 layers need TDQWeightFakeQuantize. Make the qconfig with tdq_qconfig."
        )
    if quantizer.scale.numel() == 0:
        quantizer.initialise(layer.weight)
    return quantizer if quantizer.enabled else None


def has_integer_kernel(layer: Any) -> bool:
    """Whether the layer can run on int8 codes: quantized weight, padding with zeros."""
    if weight_quantizer(layer) is None:
        return False
    return isinstance(layer, nn.Linear) or (
        getattr(layer, "padding_mode", None) == "zeros" and not isinstance(layer.padding, str)
    )


def int8_layer(layer: nn.Module) -> Int8Layer:
    """The layer with int8 weights.

    Raises:
        AdapterError: The layer is fused with another operation, not float32, or its weight has
            zero points.
    """
    plain, quantizer = _plain(layer), weight_quantizer(layer)
    assert quantizer is not None
    if quantizer.zero_point.any():
        raise AdapterError(
            f"The weight of a {type(layer).__name__} has zero points up to "
            f"{quantizer.zero_point.abs().max():g}, and int8 layers take symmetric weights. "
            "Prepare the model with symmetric_weights=True, or run it as it is; "
            "tdq_plugin.adapters.torch_ao.convert gives a reference graph for other backends."
        )
    codes, scale = quantizer.codes(plain.weight), quantizer.positive_scale().detach()
    if isinstance(plain, nn.Linear):
        return Int8Linear(codes, scale, plain.bias)
    return Int8Conv(codes, scale, plain)


def float_layer(layer: nn.Module) -> nn.Module:
    """A plain float layer, with its weight quantized if the layer has a weight quantizer."""
    quantizer = weight_quantizer(layer)
    plain: nn.Module = _plain(layer)
    if quantizer is not None:
        with torch.no_grad():
            plain.weight = nn.Parameter(quantizer(plain.weight))
    return plain


def _plain(layer: Any) -> Any:
    if type(layer) not in LAYERS and hasattr(layer, "to_float"):
        layer = layer.to_float()
    if type(layer) not in LAYERS:
        raise AdapterError(
            f"A {type(layer).__name__} cannot be lowered to int8: the layer does more than its "
            "product. Prepare the model without fusing layers."
        )
    if layer.weight.dtype != torch.float32:
        raise AdapterError(
            f"A layer's weight is {layer.weight.dtype}; int8 layers are made from float32. "
            "Call model.float() first."
        )
    return layer
