"""How the full-size PTQ recipes quantize weights."""

from typing import Literal

from torch import nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.weights import WeightQuantizer

__all__ = ["WeightChoice", "check_weights", "set_weight_ranges"]

WeightChoice = Literal["minmax", "mse", "adaround", "native"]


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


def set_weight_ranges(model: nn.Module, choice: WeightChoice) -> None:
    """Set the range of every weight quantizer: all values, or the least squared error.

    With `adaround` that is the grid whose rounding is learned later. `native` changes nothing.
    """
    if choice == "native":
        return
    for module in model.modules():
        quantizer = getattr(module, "weight_fake_quant", None)
        if isinstance(quantizer, WeightQuantizer):
            quantizer.initialise(
                module.get_parameter("weight"), "minmax" if choice == "minmax" else "mse"
            )
