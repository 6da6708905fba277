"""Small questions about the nodes of an `ov.Model`."""

from collections.abc import Iterator
from math import prod

import openvino as ov

__all__ = [
    "CONVOLUTIONS",
    "consumers",
    "fake_quantizers",
    "is_constant",
    "is_single",
    "layer_name",
    "sizes",
    "static_size",
]

CONVOLUTIONS = (
    "Convolution",
    "GroupConvolution",
    # The transposed ones.
    "ConvolutionBackpropData",
    "GroupConvolutionBackpropData",
)
"""Types of the layers whose input 0 is the activation and input 1 the kernel."""


def consumers(output: ov.Output) -> list[ov.Input]:
    """The inputs that read an output."""
    return list(output.get_target_inputs())


def fake_quantizers(model: ov.Model) -> Iterator[ov.Node]:
    """The `FakeQuantize` nodes of activations, in order of execution."""
    for node in model.get_ordered_ops():
        if node.get_type_name() == "FakeQuantize" and not is_constant(node.input_value(0)):
            yield node


def is_constant(output: ov.Output) -> bool:
    """Whether a value depends on no input of the model."""
    pending, seen = [output.get_node()], set()
    while pending:
        node = pending.pop()
        if node.get_type_name() == "Parameter":
            return False
        sources = [value.get_node() for value in node.input_values()]
        pending += [source for source in sources if source.get_name() not in seen]
        seen |= {source.get_name() for source in sources}
    return True


def is_single(output: ov.Output) -> bool:
    """Whether a value is one number, whatever its rank."""
    return static_size(sizes(output)) == 1


def sizes(output: ov.Output) -> list[int | None]:
    """The dimensions of a value; None where they are dynamic.

    Only for values of known rank, which all of a converted model's are.
    """
    shape = output.get_partial_shape()
    return [None if size.is_dynamic else size.get_length() for size in shape]


def static_size(dimensions: list[int | None]) -> int | None:
    """The number of values, None if it is dynamic."""
    known = [size for size in dimensions if size is not None]
    return prod(known) if len(known) == len(dimensions) else None


def layer_name(node: ov.Node) -> str:
    """The path of the torch module that a node came from, or the node's own name.

    `__module.mid.conv1/aten::_convolution/Convolution` is `mid.conv1`.
    """
    name: str = node.get_friendly_name()
    path = name.partition("/")[0]
    return path.removeprefix("__module.") if path.startswith("__module.") else name
