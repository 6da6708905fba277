"""The state of a reconstruction between two blocks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tdq_plugin.errors import ConfigError, TableFormatError
from tdq_plugin.files import atomic_file
from tdq_plugin.reconstruct.rounded_layers import RoundedLayers
from tdq_plugin.scales.bank import ScaleBank

__all__ = ["load_checkpoint", "save_checkpoint"]

_ROUNDING = "rounding:"


def save_checkpoint(
    path: Path, bank: ScaleBank, rounded: RoundedLayers, config: Any, losses: list[float]
) -> None:
    """Write the bank, and roundings and losses of the finished blocks, atomically."""
    metadata = {"config": json.dumps(asdict(config)), "losses": json.dumps(losses)}
    state = bank.state_dict() | {_ROUNDING + k: v for k, v in rounded.state_dict().items()}
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_checkpoint(
    path: Path, bank: ScaleBank, rounded: RoundedLayers, config: Any
) -> list[float]:
    """Restore bank and roundings if there is a checkpoint; return the finished blocks' losses.

    Raises:
        ConfigError: The checkpoint was written with another configuration, or another bank.
        TableFormatError: The file is not readable.
    """
    if not path.exists():
        return []
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TableFormatError(f"{path} is not a readable checkpoint: {error}.") from error
    if metadata.get("config") != json.dumps(asdict(config)):
        raise ConfigError(
            f"{path} was written with another configuration: {metadata.get('config')}. "
            "Remove it, or choose another file."
        )
    scales = {k: v for k, v in state.items() if not k.startswith(_ROUNDING)}
    # Before anything is loaded, for torch would load what fits.
    if {k: v.shape for k, v in scales.items()} != {
        k: v.shape for k, v in bank.state_dict().items()
    }:
        raise ConfigError(
            f"{path} was written with another scale bank than this {type(bank).__name__} of "
            f"{len(bank.names)} quantizers. Remove it, or choose another file."
        )
    bank.load_state_dict(scales)
    rounded.load_state_dict(
        {k.removeprefix(_ROUNDING): v for k, v in state.items() if k.startswith(_ROUNDING)}
    )
    losses: list[float] = json.loads(metadata["losses"])
    return losses
