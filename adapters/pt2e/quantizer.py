"""The quantizer for `prepare_qat_pt2e` and `prepare_pt2e`."""

import torch
from torch import fx
from torchao.quantization.pt2e.quantizer import (
    QuantizationAnnotation,
    QuantizationSpec,
    QuantizationSpecBase,
    Quantizer,
)
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

from tdq_plugin.adapters.pt2e.fake_quantize import TDQFakeQuantize, TDQWeightFakeQuantize
from tdq_plugin.adapters.pt2e.operators import is_layer, layer_path, operand_indices, weight_node
from tdq_plugin.adapters.pt2e.timestep_input import prepare_timestep_input
from tdq_plugin.graph.timestep_path import sees_samples, sources
from tdq_plugin.grid import activation_grid, check_bits, weight_grid
from tdq_plugin.layer_names import choose_layers

__all__ = ["TDQQuantizer", "tdq_activation_spec", "tdq_weight_spec"]


def tdq_activation_spec(bits: int = 8, symmetric: bool = False) -> QuantizationSpec:
    """The specification of a TDQ activation, for quantizers of your own."""
    grid = activation_grid(bits, symmetric)
    return QuantizationSpec(
        dtype=torch.int8 if symmetric else torch.uint8,
        observer_or_fake_quant_ctr=TDQFakeQuantize,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        qscheme=torch.per_tensor_symmetric if symmetric else torch.per_tensor_affine,
    )


def tdq_weight_spec(bits: int = 8, symmetric: bool = True) -> QuantizationSpec:
    """The specification of a weight with LSQ gradients, per output channel."""
    grid = weight_grid(bits, symmetric)
    return QuantizationSpec(
        dtype=torch.int8,
        observer_or_fake_quant_ctr=TDQWeightFakeQuantize,
        quant_min=grid.quant_min,
        quant_max=grid.quant_max,
        qscheme=torch.per_channel_symmetric if symmetric else torch.per_channel_affine,
    )


class TDQQuantizer(Quantizer):
    """Quantizes the inputs of 1d and 2d convolutions, linear layers and matrix products.

    Other layers, those whose weight is no parameter, and those that depend on the timestep but not
    on the sample (the time embedding and its projections) stay float.

    Args:
        activation_bits: 2 to 8.
        weight_bits: 2 to 8.
        symmetric_activations: Signed activations without a zero point.
        first_last_bits: Bits of the first and last layer, as is usual; None treats them as others.
        float_layers: Further layers that stay float: names, names of modules that hold layers, or
            wildcards such as `*.conv_shortcut`.
        symmetric_weights: Weights without a zero point, as integer kernels take them; else each
            output channel has its own.
        timestep_argument: Name of the graph's input that holds the timestep, if it is not
            `timestep`, `timesteps` or `t`.

    Raises:
        ConfigError: Bits are not supported; by prepare, if an entry of `float_layers` matches no
            layer.
    """

    def __init__(
        self,
        activation_bits: int = 8,
        weight_bits: int = 8,
        symmetric_activations: bool = False,
        first_last_bits: int | None = 8,
        float_layers: tuple[str, ...] = (),
        symmetric_weights: bool = True,
        timestep_argument: str | None = None,
    ) -> None:
        super().__init__()
        check_bits(activation_bits, weight_bits, first_last_bits)
        outer = first_last_bits or activation_bits, first_last_bits or weight_bits
        symmetric = symmetric_activations, symmetric_weights
        self.inner = _specs((activation_bits, weight_bits), symmetric)
        self.outer = _specs(outer, symmetric)
        self.float_layers, self.timestep_argument = float_layers, timestep_argument

    def transform_for_annotation(self, model: fx.GraphModule) -> fx.GraphModule:
        prepare_timestep_input(model, self.timestep_argument)
        return model

    def annotate(self, model: fx.GraphModule) -> fx.GraphModule:
        nodes = _on_the_samples_path(model.graph)
        layers = list(dict.fromkeys(layer_path(node) for node in nodes if is_layer(node)))
        others = [layer_path(node) for node in model.graph.nodes if is_layer(node)]
        known = [*layers, *(name for name in others if name not in layers)]
        left_float = set(choose_layers(known, self.float_layers))
        outer = {*layers[:1], *layers[-1:]}
        for node in nodes:
            path = layer_path(node) if is_layer(node) else None
            if path not in left_float:
                specs = self.outer if path in outer else self.inner
                _annotate(node, *specs)
        return model

    def validate(self, model: fx.GraphModule) -> None:
        """Every annotated operator is supported."""


def _specs(
    bits: tuple[int, int], symmetric: tuple[bool, bool]
) -> tuple[QuantizationSpec, QuantizationSpec]:
    return tdq_activation_spec(bits[0], symmetric[0]), tdq_weight_spec(bits[1], symmetric[1])


def _on_the_samples_path(graph: fx.Graph) -> list[fx.Node]:
    """Operators whose activations are quantized, in order of execution."""
    depends = sources(graph)
    return [node for node in graph.nodes if operand_indices(node) and sees_samples(depends[node])]


def _annotate(node: fx.Node, activation: QuantizationSpec, weight: QuantizationSpec) -> None:
    specs: dict[fx.Node, QuantizationSpecBase | None] = {}
    for index in operand_indices(node):
        operand = node.args[index]
        assert isinstance(operand, fx.Node)
        specs[operand] = activation
    if is_layer(node):
        specs[weight_node(node)] = weight
    node.meta[Q_ANNOTATION_KEY] = QuantizationAnnotation(specs, _annotated=True)
