"""Bits of a quantized model."""

from dataclasses import dataclass

__all__ = ["Bits"]


@dataclass(frozen=True)
class Bits:
    """Bits of weights and activations, written `W8A4`."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"
