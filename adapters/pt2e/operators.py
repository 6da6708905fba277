"""The operators of an exported graph whose inputs are quantized, and the layers that they were."""

from operator import attrgetter
from typing import Any

import torch
from torch import fx, nn

__all__ = ["is_layer", "layer_path", "operand_indices", "weight_node"]

_ATEN = torch.ops.aten
_LAYERS: set[Any] = {
    _ATEN.conv1d.default,
    _ATEN.conv1d.padding,
    _ATEN.conv2d.default,
    _ATEN.conv2d.padding,
    _ATEN.linear.default,
}
_PRODUCTS: dict[Any, tuple[int, ...]] = {
    _ATEN.matmul.default: (0, 1),
    _ATEN.bmm.default: (0, 1),
    # baddbmm adds its first argument, it does not multiply it.
    _ATEN.baddbmm.default: (1, 2),
    _ATEN.scaled_dot_product_attention.default: (0, 1, 2),
}


def is_layer(node: fx.Node) -> bool:
    """Whether the node is a convolution or a linear layer with a parameter as its weight."""
    return node.target in _LAYERS and _is_parameter(weight_node(node))


def operand_indices(node: fx.Node) -> tuple[int, ...]:
    """Positions of the activations that are quantized."""
    return (0,) if is_layer(node) else _PRODUCTS.get(node.target, ())


def weight_node(node: fx.Node) -> fx.Node:
    """The node of a layer's weight, before any quantizer."""
    weight = node.args[1]
    assert isinstance(weight, fx.Node)
    while weight.op == "call_module":
        (weight,) = weight.all_input_nodes
    return weight


def _is_parameter(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    if node.op != "get_attr" or owner is None:
        return False
    return isinstance(attrgetter(str(node.target))(owner), nn.Parameter)


def layer_path(node: fx.Node) -> str:
    """The module that a layer was: its parameters keep their names.

    Example:
        >>> program = torch.export.export(torch.nn.Sequential(torch.nn.ReLU(),
        ...     torch.nn.Linear(2, 2)), (torch.ones(1, 2),))
        >>> [layer_path(node) for node in program.module().graph.nodes if is_layer(node)]
        ['1']
    """
    return str(weight_node(node).target).rpartition(".")[0]
