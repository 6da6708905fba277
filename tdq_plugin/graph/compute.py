"""The operations whose inputs are quantized: layers with weights, and matrix products."""

import operator
from typing import Any

import torch
from torch import fx, nn

from tdq_plugin.quantizer import ActivationQuantizer

__all__ = [
    "LAYERS",
    "PRODUCTS",
    "inner_layers",
    "is_layer",
    "is_product",
    "is_quantizer",
    "normalise_calls",
    "operand_indices",
    "quantizer_nodes",
    "unsupported",
]

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
PRODUCTS: dict[Any, tuple[str, ...]] = {
    torch.matmul: ("input", "other"),
    operator.matmul: ("a", "b"),
    torch.bmm: ("input", "mat2"),
    torch.baddbmm: ("input", "batch1", "batch2"),
    nn.functional.scaled_dot_product_attention: ("query", "key", "value"),
}

_METHODS = {
    function.__name__: function
    for function in (torch.matmul, torch.bmm, torch.baddbmm, torch.mm, torch.addmm)
}
_OTHER_LAYERS = (
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Bilinear,
    nn.RNNBase,
    nn.RNNCellBase,
)
_OTHER_CALLS = (
    torch.einsum,
    torch.mm,
    torch.addmm,
    torch.conv1d,
    torch.conv2d,
    torch.conv3d,
    torch.conv_transpose1d,
    torch.conv_transpose2d,
    torch.conv_transpose3d,
    nn.functional.linear,
)


def is_layer(node: fx.Node) -> bool:
    """Whether the node calls a convolution or a linear layer."""
    return isinstance(_called(node), LAYERS)


def is_product(node: fx.Node) -> bool:
    """Whether the node multiplies two activations."""
    return node.op == "call_function" and node.target in PRODUCTS


def is_quantizer(node: fx.Node) -> bool:
    """Whether the node calls an activation quantizer."""
    return isinstance(_called(node), ActivationQuantizer)


def quantizer_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that call an activation quantizer, in order of execution."""
    return [node for node in graph.nodes if is_quantizer(node)]


def operand_indices(node: fx.Node) -> list[int]:
    """Positions of the arguments that are quantized."""
    if is_layer(node):
        return [0]
    if not is_product(node):
        return []
    # baddbmm adds its first argument, it does not multiply it.
    first = 1 if node.target is torch.baddbmm else 0
    return list(range(first, len(PRODUCTS[node.target])))


def normalise_calls(graph: fx.Graph) -> None:
    """Let `a.matmul(b)` and `matmul(input=a, other=b)` be `matmul(a, b)`; in place.

    Operations are known by their function, as torch.ao does, and operands by their position.
    """
    for node in graph.nodes:
        if node.op == "call_method" and node.target in _METHODS:
            node.op, node.target = "call_function", _METHODS[str(node.target)]
        names = ("input",) if is_layer(node) else PRODUCTS.get(node.target, ())
        for name in names[len(node.args) :]:
            if name in node.kwargs:
                node.args = (*node.args, node.kwargs[name])
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != name}


def inner_layers(node: fx.Node) -> list[str]:
    """Paths of the layers within a module that the graph calls as a whole.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention = nn.MultiheadAttention(2, 1)
        ...     def forward(self, x):
        ...         return self.attention(x, x, x)
        >>> graph_module = fx.symbolic_trace(Model())
        >>> [inner_layers(node) for node in graph_module.graph.nodes][1]
        ['attention.out_proj']
    """
    called = _called(node)
    if called is None:
        return []
    return [
        f"{node.target}.{path}"
        for path, module in called.named_modules(remove_duplicate=False)
        if path and isinstance(module, (*LAYERS, *_OTHER_LAYERS))
    ]


def unsupported(node: fx.Node) -> str | None:
    """What a node is that computes with weights or multiplies activations, and stays float.

    Example:
        >>> graph_module = fx.symbolic_trace(nn.Sequential(nn.ConvTranspose2d(1, 1, 2)))
        >>> [unsupported(node) for node in graph_module.graph.nodes]
        [None, '0 (ConvTranspose2d)', None]
    """
    if node.op == "call_function":
        return f"{node.name} ({node.target.__name__})" if node.target in _OTHER_CALLS else None
    called = _called(node)
    # A subclass may compute something else, so the frameworks go by the exact type.
    is_subclass = isinstance(called, LAYERS) and type(called) not in LAYERS
    if isinstance(called, _OTHER_LAYERS) or is_subclass or inner_layers(node):
        return f"{node.target} ({type(called).__name__})"
    return None


def _called(node: fx.Node) -> nn.Module | None:
    owner = node.graph.owning_module
    if node.op != "call_module" or owner is None:
        return None
    return owner.get_submodule(str(node.target))
