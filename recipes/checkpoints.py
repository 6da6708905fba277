"""Checkpoints of a training: the newest, and the one before it in case the newest is damaged."""

import json
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.run_state import differences

__all__ = ["check_settings", "load_checkpoint", "previous_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint, atomically; the one before it stays as `NAME.previous.pt`."""
    with atomic_file(path) as temporary:
        # An open file tells of a full disk; a path gives a RuntimeError without a reason.
        with temporary.open("wb") as file:
            torch.save(state, file)
        if path.exists():
            path.replace(previous_checkpoint(path))


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> dict[str, Any] | None:
    """The newest checkpoint that can be read; None if there has been none.

    Raises:
        ConfigError: None of them can be read.
    """
    damaged = []
    for file in (path, previous_checkpoint(path)):
        if not file.exists():
            continue
        try:
            state: dict[str, Any] = torch.load(file, weights_only=True, map_location=device)
        except torch.cuda.OutOfMemoryError:
            raise
        except Exception as error:  # Files can be damaged in many ways.
            damaged.append(f"{file} ({type(error).__name__})")
            continue
        if damaged:
            warnings.warn(f"{damaged[0]} is damaged; going on from {file}.", stacklevel=2)
        return state
    if damaged:
        raise ConfigError(
            f"Damaged: {' and '.join(damaged)}. Remove them to begin this training anew."
        )
    return None


def check_settings(
    path: Path, written: str, wanted: dict[str, Any], changeable: Collection[str]
) -> None:
    """See that a checkpoint belongs to a training.

    Args:
        path: The checkpoint, for the message.
        written: The settings that it was written with, as JSON.
        wanted: Those of the training.
        changeable: Settings that may differ, by dotted key.

    Raises:
        ConfigError: Others differ.
    """
    shown = differences(json.loads(written), wanted, changeable)
    if shown:
        raise ConfigError(
            f"{path} was written with other settings: {shown}. "
            "Choose another name=..., or remove the folder."
        )


def previous_checkpoint(path: Path) -> Path:
    """Where the checkpoint before the newest is."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")
