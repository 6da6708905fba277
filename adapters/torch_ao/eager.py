"""The road without a graph: layers are exchanged for fake-quantized ones, in place."""

from typing import TypeVar

from torch import Tensor, fx, nn
from torch.ao.quantization import QConfig
from torch.nn import functional

from tdq_plugin.adapters.torch_ao.fake_quantize import TDQFakeQuantize, initialise_weights
from tdq_plugin.adapters.torch_ao.qconfig import tdq_qconfig
from tdq_plugin.errors import AdapterError
from tdq_plugin.hooks import connect_rows
from tdq_plugin.layer_names import TIMESTEP_LAYERS, layers_to_quantize
from tdq_plugin.quantizer import ActivationQuantizer
from tdq_plugin.registry import register_adapter

__all__ = [
    "TIMESTEP_LAYERS",
    "TDQConv1d",
    "TDQConv2d",
    "TDQLinear",
    "TorchAOEagerAdapter",
    "quantize_eager",
]

Model = TypeVar("Model", bound=nn.Module)


class _QuantizedConvolution(nn.modules.conv._ConvNd):
    activation_fake_quant: nn.Module
    weight_fake_quant: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_fake_quant(self.weight)
        output: Tensor = self._conv_forward(self.activation_fake_quant(input), weight, self.bias)
        return output


class TDQConv1d(_QuantizedConvolution, nn.Conv1d):
    """`nn.Conv1d` with fake-quantized input and weight."""


class TDQConv2d(_QuantizedConvolution, nn.Conv2d):
    """`nn.Conv2d` with fake-quantized input and weight."""


class TDQLinear(nn.Linear):
    """`nn.Linear` with fake-quantized input and weight."""

    activation_fake_quant: nn.Module
    weight_fake_quant: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight_fake_quant(self.weight)
        return functional.linear(self.activation_fake_quant(input), weight, self.bias)


_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: TDQConv1d,
    nn.Conv2d: TDQConv2d,
    nn.Linear: TDQLinear,
}
_QUANTIZED_LAYERS = tuple(_QUANTIZED.values())


def quantize_eager(
    model: Model,
    activation_bits: int = 8,
    weight_bits: int = 8,
    symmetric_activations: bool = False,
    first_last_bits: int | None = 8,
    float_layers: tuple[str, ...] = (),
    timestep_layers: tuple[str, ...] = TIMESTEP_LAYERS,
    symmetric_weights: bool = True,
) -> Model:
    """Make the convolutions and linear layers of a model fake-quantized; in place.

    Then `attach`, `calibrate`, train and `freeze` as with a graph. Compared with a graph, products
    of activations (attention) stay float, layers that read the same tensor have a quantizer each,
    first and last are meant in the order of the modules, and subclasses of the layers stay float.
    Conversion, export and int8 need a graph.

    Args:
        model: Any model whose forward takes the timestep.
        activation_bits: 2 to 8.
        weight_bits: 2 to 8.
        symmetric_activations: Signed activations without a zero point.
        first_last_bits: Bits of the first and last layer, as is usual; None treats them as others.
        float_layers: Layers that stay float: names, names of modules that hold layers, or
            wildcards.
        timestep_layers: Wildcards of the layers on the timestep's path, which stay float; without
            a graph they are known by name only. The default covers diffusers' models, whatever
            matches none of it is quantized.
        symmetric_weights: Weights without a zero point; else each output channel has its own.

    Returns:
        The model.

    Raises:
        AdapterError: The model is a graph, or has no layer to quantize.
        ConfigError: An entry of `float_layers` matches no layer, or bits are not 2 to 8.

    Example:
        >>> class Denoiser(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 2)
        ...     def forward(self, sample, timestep):
        ...         return self.layer(sample)
        >>> type(quantize_eager(Denoiser()).layer).__name__
        'TDQLinear'
    """
    if isinstance(model, fx.GraphModule):
        raise AdapterError("The model is a graph. Use torch.ao's prepare_qat_fx or prepare_fx.")
    layers = {path: module for path, module in model.named_modules() if type(module) in _QUANTIZED}
    chosen = layers_to_quantize(list(layers), float_layers, timestep_layers)
    if not chosen:
        raise AdapterError(
            f"None of the {len(layers)} convolutions and linear layers of this "
            f"{type(model).__name__} is left to quantize. Check float_layers and timestep_layers."
        )
    bits = dict.fromkeys(chosen, (activation_bits, weight_bits))
    if first_last_bits is not None:
        bits[chosen[0]] = bits[chosen[-1]] = first_last_bits, first_last_bits
    symmetric = symmetric_activations, symmetric_weights
    # All made before the first layer changes: bits may be wrong.
    quantizers = [_quantizers(tdq_qconfig(*bits[path], *symmetric)) for path in chosen]
    for path, (activation, weight) in zip(chosen, quantizers, strict=True):
        # The layer object stays itself: references to it, hooks and tied parameters stay valid.
        layers[path].__class__ = _QUANTIZED[type(layers[path])]
        training = layers[path].training
        layers[path].activation_fake_quant = activation.train(training)
        layers[path].weight_fake_quant = weight.train(training)
    initialise_weights(model)
    return model


def _quantizers(qconfig: QConfig) -> tuple[nn.Module, nn.Module]:
    return qconfig.activation(), qconfig.weight()


@register_adapter("torch_ao_eager")
class TorchAOEagerAdapter:
    """Models from `quantize_eager`."""

    @staticmethod
    def covers(model: nn.Module) -> bool:
        return not isinstance(model, fx.GraphModule) and any(
            isinstance(module, _QUANTIZED_LAYERS) for module in model.modules()
        )

    @staticmethod
    def quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
        found: dict[str, ActivationQuantizer] = {}
        for path, module in model.named_modules():
            quantizer = getattr(module, "activation_fake_quant", None)
            if isinstance(quantizer, TDQFakeQuantize):
                found[f"{path}.input"] = quantizer
        return found

    @staticmethod
    def connect(model: nn.Module, timestep_argument: str | None) -> None:
        connect_rows(model, timestep_argument)
