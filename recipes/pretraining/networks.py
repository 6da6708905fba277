"""Networks from a configuration, with random weights or those of a saved pipeline."""

from inspect import signature
from pathlib import Path
from typing import Any, TypeVar

from diffusers import UNet2DModel
from pydantic import AfterValidator
from torch import nn

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.float_model import load_float_model

__all__ = ["MISFITS", "arguments_of", "make_network", "start_from"]

Network = TypeVar("Network", bound=nn.Module)
# What diffusers and torch raise at sizes that do not fit together.
MISFITS = (TypeError, ValueError, RuntimeError, AttributeError)


def arguments_of(network: type[nn.Module]) -> AfterValidator:
    """A pydantic validator: a dict has arguments of a network, and no others."""
    known = signature(network).parameters

    def check(values: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise ValueError(f"{network.__name__} takes no {unknown}, but {', '.join(known)}")
        return values

    return AfterValidator(check)


def make_network(key: str, network: type[Network], arguments: dict[str, Any]) -> Network:
    """Build a network of a configuration.

    Args:
        key: Of the arguments in the configuration, for the message.
        network: Its class.
        arguments: Of the class.

    Raises:
        ConfigError: They do not fit together.
    """
    try:
        return network(**arguments)
    except MISFITS as error:
        raise ConfigError(f"{key}: {network.__name__} cannot be built: {error}") from error


def start_from(unet: UNet2DModel, model: Path | None, checkpoint: Path) -> None:
    """Take the weights of a saved pipeline's UNet.

    Args:
        unet: The network, with random weights.
        model: The pipeline's folder; without one the weights stay random.
        checkpoint: Of the training. If it exists already, its weights come later, and the pipeline
            is not read.

    Raises:
        ConfigError: There is no such pipeline, or its UNet has other shapes.
    """
    if model is None or checkpoint.exists():
        return
    trained = load_float_model(model, "start_from").unet
    try:
        unet.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"start_from = {str(model)!r} has a UNet of other shapes than `unet`: "
            f"{str(error).splitlines()[1].strip()}"
        ) from error
