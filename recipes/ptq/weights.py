"""How the PTQ recipes quantize weights."""

from typing import Literal

from torch import nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.grid import weight_grid
from tdq_plugin.ranges import RangeMethod
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.weights import WeightQuantizer

__all__ = ["WeightChoice", "check_weights", "is_symmetric", "set_weight_ranges"]

WeightChoice = Literal["minmax", "asymmetric_minmax", "mse", "adaround", "native"]


def check_weights(choice: WeightChoice, framework: Framework, adapter: str) -> None:
    """See that the framework leaves the choice to the recipe.

    Raises:
        ConfigError: It has weight quantizers of its own.
    """
    # Both need this package's weight quantizer.
    if choice != "native" and not framework.learns_rounding:
        raise ConfigError(
            f"weights = {choice!r}: {adapter} sets the ranges of weights itself. "
            "Set weights=native."
        )


def is_symmetric(choice: WeightChoice) -> bool:
    """Whether weights have no zero points, as integer kernels take them."""
    return choice != "asymmetric_minmax"


def set_weight_ranges(model: nn.Module, choice: WeightChoice) -> None:
    """Set the range of every weight quantizer: all values, or the least squared error.

    With `adaround` that is the grid whose rounding is learned later. `native` changes nothing.
    """
    if choice == "native":
        return
    method: RangeMethod = "minmax" if choice in ("minmax", "asymmetric_minmax") else "mse"
    for module in model.modules():
        quantizer = getattr(module, "weight_fake_quant", None)
        if isinstance(quantizer, WeightQuantizer):
            quantizer.grid = weight_grid(quantizer.grid.bits, symmetric=is_symmetric(choice))
            quantizer.initialise(module.get_parameter("weight"), method)
