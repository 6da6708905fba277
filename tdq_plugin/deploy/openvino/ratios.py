"""Constant quantizers between a division and a multiplication by a ratio of the timestep."""

from collections.abc import Iterator
from dataclasses import dataclass

import openvino as ov

from tdq_plugin.deploy.openvino.nodes import consumers, fake_quantizers, is_constant, sizes

__all__ = ["RescaledValue", "factor_in_front", "find_rescaled_values", "static_reference"]


@dataclass(frozen=True)
class RescaledValue:
    """A quantized value that is multiplied by a number per sample: `product = value * ratio`.

    Attributes:
        value: Output of the `FakeQuantize`.
        ratio: One number, or one per sample along dimension 0 of `value`; not constant.
        product: Output of the `Multiply`.
    """

    value: ov.Output
    ratio: ov.Output
    product: ov.Output


def find_rescaled_values(model: ov.Model) -> Iterator[RescaledValue]:
    """All of them, in order of execution."""
    for quantizer in fake_quantizers(model):
        value = quantizer.output(0)
        for reader in consumers(value):
            product = reader.get_node()
            if product.get_type_name() == "Multiply":
                ratio = product.input_value(1 - reader.get_index())
                if _is_per_sample(ratio, value):
                    yield RescaledValue(value, ratio, product.output(0))


def static_reference(model: ov.Model) -> ov.Model:
    """A copy whose ratios are 1 for all timesteps: static quantization of the same layers.

    Args:
        model: A converted model in which no ratio has been moved yet.
    """
    reference = model.clone()
    for rescaled in list(find_rescaled_values(reference)):
        for reader in consumers(rescaled.product):
            reader.replace_source_output(rescaled.value)
        factor = factor_in_front(rescaled.value)
        if factor is not None:
            x = factor.get_node().input_value(1 - factor.get_index())
            rescaled.value.get_node().input(0).replace_source_output(x)
    reference.validate_nodes_and_infer_types()
    return reference


def factor_in_front(value: ov.Output) -> ov.Input | None:
    """Where `x * (1 / ratio)` or `x / ratio` in front of a quantizer takes the second operand."""
    quotient = value.get_node().input_value(0).get_node()
    ports = {"Multiply": (1, 0), "Divide": (1,)}.get(quotient.get_type_name(), ())
    for port in ports:
        if _is_per_sample(quotient.input_value(port), value):
            factor: ov.Input = quotient.input(port)
            return factor
    return None


def _is_per_sample(factor: ov.Output, value: ov.Output) -> bool:
    dimensions, rank = sizes(factor), len(sizes(value))
    single = all(size == 1 for size in dimensions)
    per_sample = len(dimensions) == rank and all(size == 1 for size in dimensions[1:])
    return (single or per_sample) and not is_constant(factor)
