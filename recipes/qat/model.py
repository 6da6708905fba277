"""A model in training: its weights on disk, and its scales frozen for a while."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.recipes.run_state import read_settings
from tdq_plugin.scales import FrozenBank

if TYPE_CHECKING:
    from tdq_plugin.recipes.qat.config import QATConfig

__all__ = ["copy_weights", "find_weights", "frozen", "load_weights", "save_weights"]


@contextmanager
def frozen(model: nn.Module, timesteps: Any) -> Iterator[nn.Module]:
    """For a while, the model samples: in evaluation mode, its scales frozen into a table."""
    bank, training = tdq.scale_bank(model), model.training
    model.scale_bank = FrozenBank(evaluate_table(bank, timesteps))
    try:
        yield model.eval()
    finally:
        model.scale_bank = bank
        model.train(training)


def save_weights(model: nn.Module, path: Path) -> None:
    """Save weights, weight scales and the scale bank."""
    state: dict[str, Tensor] = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in model.state_dict().items()
    }
    with atomic_file(path) as temporary:
        save_file(state, temporary)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load what `save_weights` saved, into a model prepared in the same way."""
    model.load_state_dict(load_file(path))


def copy_weights(run: Path, method: str, config: "QATConfig", path: Path) -> None:
    """Copy what another run has saved of a method; errors are those of `find_weights`."""
    source = find_weights(run, method, config)
    with atomic_file(path) as temporary:
        shutil.copyfile(source, temporary)


def find_weights(run: Path, method: str, config: "QATConfig") -> Path:
    """Where another run has saved a method's weights.

    Raises:
        ConfigError: The run has not trained this method, or with another adapter or
            model, or with other bits.
    """
    source, settings = run / "weights" / f"{method}.safetensors", run / "config.json"
    if not source.exists() or not settings.exists():
        raise ConfigError(
            f"trained = {str(run)!r} has no weights of {method!r}: {source} does not exist. "
            "Give the folder of a finished run with this method."
        )
    other = read_settings(settings)
    # A model's folder may be written in several ways.
    for key, form in (("adapter", str), ("bits", str), ("model", os.path.realpath)):
        wanted = getattr(config, key)
        if form(other[key]) != form(wanted):
            raise ConfigError(
                f"trained = {str(run)!r} is a run with {key}={other[key]}, not {wanted}."
            )
    return source
