"""Bits of a quantized model."""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator

__all__ = ["Bits", "BitsName"]


@dataclass(frozen=True)
class Bits:
    """Bits of weights and activations, written `W8A4`.

    Attributes:
        weights: Of weights.
        activations: Of activations.
        first_last: Of both in the first and the last layer; None treats them as others.
        float_layers: Layers that are not quantized: names, names of modules that hold layers, or
            wildcards.
    """

    weights: int
    activations: int
    first_last: int | None = 8
    float_layers: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> "Bits":
        """The bits of a text.

        Raises:
            ValueError: It is not of the form `W8A4`, or there are less than 2 or more than 8 bits.

        Example:
            >>> Bits.parse("W8A4").activations
            4
        """
        found = re.fullmatch("W([2-8])A([2-8])", text)
        if found is None:
            raise ValueError("write bits of weights and activations as W8A4, both from 2 to 8")
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


def _checked(text: str) -> str:
    Bits.parse(text)
    return text


BitsName = Annotated[str, AfterValidator(_checked)]
