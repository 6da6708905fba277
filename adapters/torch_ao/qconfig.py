"""Which layers torch.ao prepares, with how many bits."""

import warnings
from typing import Any

import torch
from torch import fx
from torch.ao.nn import qat
from torch.ao.quantization import QConfig, QConfigMapping
from torch.ao.quantization.backend_config import (
    BackendConfig,
    BackendPatternConfig,
    DTypeConfig,
    ObservationType,
    get_native_backend_config,
)

from tdq_plugin.adapters.torch_ao.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.errors import AdapterError
from tdq_plugin.graph.compute import LAYERS, PRODUCTS, inner_layers, is_layer, unsupported
from tdq_plugin.graph.timestep_path import Source, sees_samples, sources
from tdq_plugin.layer_names import choose_layers

__all__ = ["tdq_backend_config", "tdq_qconfig", "tdq_qconfig_mapping"]

_QAT_LAYERS = (qat.Conv1d, qat.Conv2d, qat.Linear)
_ACTIVATIONS = (torch.quint8, torch.qint8)
_LAYER_DTYPES = [DTypeConfig(codes, codes, torch.qint8, torch.float) for codes in _ACTIVATIONS]
_PRODUCT_DTYPES = [DTypeConfig(codes, codes) for codes in _ACTIVATIONS]


def tdq_qconfig(
    activation_bits: int = 8,
    weight_bits: int = 8,
    symmetric_activations: bool = False,
    symmetric_weights: bool = True,
) -> QConfig:
    """A torch.ao `QConfig` with TDQ activations and LSQ weights."""
    activation: Any = TDQFakeQuantize
    weight: Any = TDQWeightFakeQuantize
    return QConfig(
        activation=activation.with_args(bits=activation_bits, symmetric=symmetric_activations),
        weight=weight.with_args(bits=weight_bits, symmetric=symmetric_weights),
    )


def tdq_qconfig_mapping(
    graph_module: fx.GraphModule,
    activation_bits: int = 8,
    weight_bits: int = 8,
    symmetric_activations: bool = False,
    first_last_bits: int | None = 8,
    float_layers: tuple[str, ...] = (),
    symmetric_weights: bool = True,
) -> QConfigMapping:
    """The mapping for `prepare_qat_fx` or `prepare_fx`: compute layers and matrix products.

    Layers that depend on the timestep but not on the sample (the time embedding and its
    projections) stay float. So do transposed and 3-d convolutions, recurrent layers, `einsum`,
    functional layers, subclasses of layers, and modules of torch that the graph calls as a whole,
    such as `nn.MultiheadAttention`, with the layers in them; a warning tells of these.

    Args:
        graph_module: The traced model.
        activation_bits: 2 to 8.
        weight_bits: 2 to 8.
        symmetric_activations: Signed activations without a zero point.
        first_last_bits: Bits of the first and last layer, as is usual; None treats them as others.
        float_layers: Further layers that stay float: names, names of modules that hold layers, or
            wildcards such as `*.conv_shortcut`.
        symmetric_weights: Weights without a zero point, as torch's integer kernels take them; else
            each output channel has its own.

    Returns:
        A `QConfigMapping`.

    Raises:
        AdapterError: The model is not traced.
        ConfigError: An entry of `float_layers` matches no layer.
    """
    if not isinstance(graph_module, fx.GraphModule):
        raise AdapterError(
            f"A {type(graph_module).__name__} is no graph, and layers that see only the timestep "
            "are found in one. Give the mapping what tdq_plugin.trace(model, example) returns."
        )
    symmetric = symmetric_activations, symmetric_weights
    qconfig = tdq_qconfig(activation_bits, weight_bits, *symmetric)
    mapping = QConfigMapping().set_global(None)
    for operation in (*LAYERS, *PRODUCTS):
        mapping = mapping.set_object_type(operation, qconfig)
    _warn_of_float(graph_module.graph)
    layers, conditioning = _layers(graph_module.graph)
    if first_last_bits is not None and layers:
        outer = tdq_qconfig(first_last_bits, first_last_bits, *symmetric)
        mapping = mapping.set_module_name(layers[0], outer).set_module_name(layers[-1], outer)
    chosen = choose_layers([*layers, *conditioning], float_layers)
    # torch.ao knows layers by their type, and would quantize the weights of layers whose inputs
    # it does not see.
    inner = [name for node in graph_module.graph.nodes for name in inner_layers(node)]
    for name in (*conditioning, *chosen, *inner):
        mapping = mapping.set_module_name(name, None)
    return mapping


def tdq_backend_config() -> BackendConfig:
    """The layers and matrix products that TDQ quantizes, signed and unsigned.

    torch.ao's native backend observes neither `bmm` nor attention, and takes no signed
    activations. Its fusions are left out: a fused module's output is observed, and TDQ quantizes
    inputs.
    """
    config = BackendConfig("tdq")
    for layer in get_native_backend_config().configs:
        if layer.pattern in LAYERS or layer.pattern in _QAT_LAYERS:
            config.set_backend_pattern_config(layer.set_dtype_configs(_LAYER_DTYPES))
    for operation in PRODUCTS:
        product = BackendPatternConfig(operation)
        product.set_observation_type(ObservationType.OUTPUT_USE_DIFFERENT_OBSERVER_AS_INPUT)
        config.set_backend_pattern_config(product.set_dtype_configs(_PRODUCT_DTYPES))
    return config


def _warn_of_float(graph: fx.Graph) -> None:
    found = sources(graph)
    names = [
        name for node in graph.nodes if sees_samples(found[node]) and (name := unsupported(node))
    ]
    if names:
        warnings.warn(
            f"{len(names)} operations stay float, because only those Conv1d, Conv2d, Linear and "
            "products of batches of matrices are quantized that the graph shows: "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}.",
            stacklevel=3,
        )


def _layers(graph: fx.Graph) -> tuple[list[str], list[str]]:
    """Layers on the sample's path, and layers of the timestep's path, in order of execution."""
    found = sources(graph)
    on_path, conditioning = [], []
    for node in graph.nodes:
        if not is_layer(node):
            continue
        depends = found[node]
        if Source.TIMESTEP in depends and Source.SAMPLE not in depends:
            conditioning.append(str(node.target))
        else:
            on_path.append(str(node.target))
    return on_path, conditioning
