"""The layer map for `layerwise_quantize`: which Brevitas layer takes the place of which."""

from typing import Any

import brevitas.nn as qnn
from brevitas import config
from brevitas.quant import Int8WeightPerChannelFloatMSE
from torch import nn

from tdq_plugin.adapters.brevitas.quantizers import (
    OPTIONS,
    TDQInt8ActPerTensorFloat,
    TDQShiftedUint8ActPerTensorFloat,
    TDQUint8ActPerTensorFloat,
)
from tdq_plugin.errors import ConfigError

__all__ = ["LayerMap", "tdq_layer_map"]

LayerMap = dict[type[nn.Module], tuple[type[nn.Module], dict[str, Any]]]

_LAYERS = {
    nn.Conv1d: qnn.QuantConv1d,
    nn.Conv2d: qnn.QuantConv2d,
    nn.ConvTranspose2d: qnn.QuantConvTranspose2d,
    nn.Linear: qnn.QuantLinear,
}


def tdq_layer_map(
    weight_bits: int = 8,
    activation_bits: int = 8,
    symmetric_activations: bool = False,
    weight_quant: Any = Int8WeightPerChannelFloatMSE,
    bias_quant: Any = None,
    **names: Any,
) -> LayerMap:
    """Convolutions, linear layers and attention with TDQ activations.

    Attention is `nn.MultiheadAttention`, and Brevitas' module `ScaledDotProductAttention`; a call
    of torch's function is no module and stays as it is.

    Args:
        weight_bits: Bits of the weights.
        activation_bits: 2 to 8.
        symmetric_activations: Signed activations without a zero point; else unsigned ones with.
            Attention weights are never negative and have no zero point.
        weight_quant: A weight quantizer of Brevitas.
        bias_quant: A bias quantizer of Brevitas that has a scale of its own.
        **names: What else the activation quantizers shall be told, such as `tdq_bank` or
            `tdq_estimator`; see `TDQInt8ActPerTensorFloat`.

    Returns:
        From float layers to Brevitas layers and their arguments; change it as you like.

    Raises:
        ConfigError: `BREVITAS_JIT` is set, and the weight quantizer is one that it cannot compile;
            or an option of TDQ is unknown.

    Example:
        >>> layer, arguments = tdq_layer_map(activation_bits=4)[nn.Conv2d]
        >>> layer.__name__, arguments["input_quant"].bit_width
        ('QuantConv2d', 4)
    """
    if config.JIT_ENABLED and weight_quant is Int8WeightPerChannelFloatMSE:
        raise ConfigError(
            "BREVITAS_JIT is set, and TorchScript cannot compile Brevitas' search for the least "
            "error. Give weight_quant=Int8WeightPerChannelFloat, or unset BREVITAS_JIT."
        )
    unknown = [name for name in names if name.startswith("tdq_") and name not in OPTIONS]
    if unknown:
        raise ConfigError(f"{unknown} are no options of TDQ; there are {', '.join(OPTIONS)}.")
    kind = TDQInt8ActPerTensorFloat if symmetric_activations else TDQShiftedUint8ActPerTensorFloat
    activation = kind.let(bit_width=activation_bits, **names)
    unsigned = TDQUint8ActPerTensorFloat.let(bit_width=activation_bits, **names)
    layer = {
        "input_quant": activation,
        "weight_quant": weight_quant.let(bit_width=weight_bits),
        "bias_quant": bias_quant,
    }
    products = {
        "q_scaled_quant": activation,
        "k_transposed_quant": activation,
        "v_quant": activation,
        "attn_output_weights_quant": unsigned,
    }
    plain = {"return_quant_tensor": False}
    layer_map: LayerMap = {
        original: (quantized, {**layer, **plain}) for original, quantized in _LAYERS.items()
    }
    projections = {
        f"{projection}_{slot}": quantizer
        for projection in ("in_proj", "out_proj")
        for slot, quantizer in layer.items()
    }
    attention = {**projections, **products, **plain}
    layer_map[nn.MultiheadAttention] = (qnn.QuantMultiheadAttention, attention)
    layer_map[qnn.ScaledDotProductAttention] = (qnn.QuantScaledDotProductAttention, products)
    return layer_map
