"""The state of a reconstruction between two blocks."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tdq_plugin.errors import ConfigError, TableFormatError
from tdq_plugin.files import atomic_file
from tdq_plugin.scales.bank import ScaleBank

__all__ = ["load_checkpoint", "save_checkpoint"]


def save_checkpoint(path: Path, bank: ScaleBank, config: Any, losses: list[float]) -> None:
    """Write the bank and the losses of the finished blocks, atomically."""
    metadata = {"config": json.dumps(asdict(config)), "losses": json.dumps(losses)}
    tensors = {name: tensor.contiguous() for name, tensor in bank.state_dict().items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, metadata)


def load_checkpoint(path: Path, bank: ScaleBank, config: Any) -> list[float]:
    """Restore the bank if there is a checkpoint; return the losses of the finished blocks.

    Raises:
        ConfigError: The checkpoint was written with another configuration.
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
    bank.load_state_dict(state)
    losses: list[float] = json.loads(metadata["losses"])
    return losses
