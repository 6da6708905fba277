"""One call from a float model to Brevitas layers with TDQ, with the usual exceptions."""

from collections.abc import Sequence
from typing import Any, TypeVar

from brevitas.graph.quantize import layerwise_quantize
from torch import nn

from tdq_plugin.adapters.brevitas.layer_map import LayerMap, tdq_layer_map
from tdq_plugin.errors import AdapterError
from tdq_plugin.grid import check_bits
from tdq_plugin.layer_names import TIMESTEP_LAYERS, layers_to_quantize

__all__ = ["quantize_layerwise", "timestep_path_names"]

Model = TypeVar("Model", bound=nn.Module)


def quantize_layerwise(
    model: Model,
    *,
    activation_bits: int = 8,
    weight_bits: int = 8,
    symmetric_activations: bool = False,
    first_last_bits: int | None = 8,
    float_layers: tuple[str, ...] = (),
    timestep_layers: tuple[str, ...] = TIMESTEP_LAYERS,
    **options: Any,
) -> Model:
    """Exchange a model's layers by Brevitas' `layerwise_quantize` and `tdq_layer_map`; in place.

    Args:
        model: Any model whose forward takes the timestep.
        activation_bits: 2 to 8.
        weight_bits: Bits of the weights.
        symmetric_activations: Signed activations without a zero point.
        first_last_bits: Bits of the first and last layer in the order of the modules, as is usual;
            None treats them as others.
        float_layers: Layers that stay float: names, names of modules that hold layers, or
            wildcards.
        timestep_layers: Wildcards of the layers on the timestep's path, which stay float. The
            default covers diffusers' models, whatever matches none of it is quantized.
        **options: As for `tdq_layer_map`.

    Returns:
        The model, for `tdq_plugin.attach`.

    Raises:
        AdapterError: The model has no layer to quantize.
        ConfigError: An entry of `float_layers` matches no layer, or bits are not 2 to 8.

    Example:
        >>> class Denoiser(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = nn.Linear(2, 2)
        ...     def forward(self, sample, timestep):
        ...         return self.layer(sample)
        >>> type(quantize_layerwise(Denoiser()).layer).__name__
        'QuantLinear'
    """
    check_bits(activation_bits, weight_bits, first_last_bits)
    inner = tdq_layer_map(weight_bits, activation_bits, symmetric_activations, **options)
    layers = _layers(model, inner)
    chosen = layers_to_quantize(layers, float_layers, timestep_layers)
    if not chosen:
        raise AdapterError(
            f"None of the {len(layers)} layers of this {type(model).__name__} that Brevitas can "
            "quantize is left. Check float_layers and timestep_layers."
        )
    aliases = _aliases(model, layers)
    if first_last_bits is not None:
        outer = tdq_layer_map(first_last_bits, first_last_bits, symmetric_activations, **options)
        first_and_last = {chosen[0], chosen[-1]}
        others = [name for name in layers if name not in first_and_last]
        layerwise_quantize(model, outer, [*others, *aliases])
    others = [name for name in layers if name not in set(chosen)]
    layerwise_quantize(model, inner, [*others, *aliases])
    for alias, name in aliases.items():
        model.set_submodule(alias, model.get_submodule(name))
    return model


def timestep_path_names(
    model: nn.Module, timestep_layers: Sequence[str] = TIMESTEP_LAYERS
) -> list[str]:
    """The layers on the timestep's path, for `layerwise_quantize(name_blacklist=...)`.

    Args:
        model: The float model.
        timestep_layers: As for `quantize_layerwise`.

    Returns:
        Names in the order of the modules.
    """
    layers = _layers(model, tdq_layer_map())
    wanted = set(layers_to_quantize(layers, (), timestep_layers))
    return [name for name in layers if name not in wanted]


def _aliases(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The other names of shared layers, with the first one: Brevitas would untie the layers."""
    first = {model.get_submodule(name): name for name in layers}
    every = model.named_modules(remove_duplicate=False)
    return {name: first[layer] for name, layer in every if first.get(layer, name) != name}


def _layers(model: nn.Module, layer_map: LayerMap) -> list[str]:
    return [path for path, module in model.named_modules() if type(module) in layer_map]
