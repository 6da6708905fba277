"""Names of quantizers that agree between frameworks, so that tables can move between them."""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

__all__ = ["name_quantizers"]

Quantizer = TypeVar("Quantizer", bound=Hashable)


def name_quantizers(
    consumers: Iterable[tuple[str | None, Mapping[int, Quantizer]]],
) -> dict[Quantizer, str]:
    """Name each quantizer by the first operation that reads it.

    Where the quantizers themselves stand differs between frameworks; the operations do not.

    Args:
        consumers: Operations in order of execution: the path of a layer, or None for a product of
            activations, and the quantizers of its operands by position.

    Returns:
        `<layer>.input` for a layer's first call, `<layer>.input.K` for its K-th repetition, and
        `product.N.K` for operand K of the N-th product with quantized operands; in the order of
        the consumers.

    Example:
        >>> name_quantizers([("query", {0: "x"}), (None, {0: "q", 1: "x"}), (None, {1: "v"})])
        {'x': 'query.input', 'q': 'product.0.0', 'v': 'product.1.1'}
    """
    names: dict[Quantizer, str] = {}
    calls: Counter[str | None] = Counter()
    for layer, operands in consumers:
        for position, quantizer in operands.items():
            names.setdefault(quantizer, _name(layer, calls[layer], position))
        calls[layer] += bool(operands)
    return names


def _name(layer: str | None, call: int, position: int) -> str:
    if layer is None:
        return f"product.{call}.{position}"
    return f"{layer}.input.{call}" if call else f"{layer}.input"
