"""The state of a reconstruction between two blocks."""

import json
from collections.abc import Iterator
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from tdq_plugin.attach import scale_bank
from tdq_plugin.errors import ConfigError, TableFormatError
from tdq_plugin.files import atomic_file
from tdq_plugin.reconstruct.config import ReconstructionConfig
from tdq_plugin.reconstruct.rounded_layers import RoundedLayers
from tdq_plugin.weights import WeightQuantizer

__all__ = ["Checkpoint"]

_ROUNDING = "rounding:"
_REMEDY = "Remove it, or choose another file."


class Checkpoint:
    """The bank, and roundings and losses of the finished blocks, in a file.

    It belongs to a configuration, a bank and the weights that the reconstruction starts from.

    Args:
        path: The file; None keeps nothing.
        model: The attached model, its weights not yet rounded.
        config: How it is trained.

    Raises:
        ConfigError: The path is a folder.
    """

    def __init__(
        self, path: str | Path | None, model: nn.Module, config: ReconstructionConfig
    ) -> None:
        self._path = None if path is None else Path(path)
        if self._path is not None and self._path.is_dir():
            raise ConfigError(f"checkpoint={str(path)!r} is a folder; give a file in it.")
        self._bank = scale_bank(model)
        self._belongs_to = {} if path is None else _belongs_to(model, config)

    def save(self, rounded: RoundedLayers, losses: list[float]) -> None:
        """Write it, atomically."""
        if self._path is None:
            return
        metadata = self._belongs_to | {"losses": json.dumps(losses)}
        roundings = {_ROUNDING + path: v for path, v in rounded.state_dict().items()}
        state = self._bank.state_dict() | roundings
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        with atomic_file(self._path) as temporary:
            save_file(tensors, temporary, metadata)

    def load(self, rounded: RoundedLayers) -> list[float]:
        """Restore bank and roundings if there is a file; return the finished blocks' losses.

        Raises:
            ConfigError: It was written with another configuration, for another bank, or from other
                weights, as those of a model that has been reconstructed already.
            TableFormatError: The file is not readable.
        """
        if self._path is None or not self._path.exists():
            return []
        metadata, state = _read(self._path)
        self._check(metadata)
        learned = {key for key in state if key.startswith(_ROUNDING)}
        self._bank.load_state_dict({k: v for k, v in state.items() if k not in learned})
        rounded.load_state_dict({k.removeprefix(_ROUNDING): state[k] for k in learned})
        losses: list[float] = json.loads(metadata["losses"])
        return losses

    def _check(self, metadata: dict[str, str]) -> None:
        for what, ours in self._belongs_to.items():
            theirs = metadata.get(what)
            if theirs == ours:
                continue
            if what == "weights":
                raise ConfigError(
                    f"{self._path} was written from other weights than this model has. If the "
                    "model has been reconstructed already, its weights are rounded and there is "
                    f"nothing left to do. {_REMEDY}"
                )
            raise ConfigError(
                f"{self._path} was written with another {what}: {theirs} instead of {ours}. "
                f"{_REMEDY}"
            )


def _belongs_to(model: nn.Module, config: ReconstructionConfig) -> dict[str, str]:
    bank = scale_bank(model)
    names = zip(bank.names, bank.grids, strict=True)
    return {
        "configuration": json.dumps(asdict(config)),
        "scale bank": f"{type(bank).__name__}({bank.extra_repr()})",
        "set of quantizers": json.dumps({name: asdict(grid) for name, grid in names}),
        "set of weight quantizers": json.dumps(
            {
                path: asdict(module.grid) if module.enabled else None
                for path, module in _weight_quantizers(model)
            }
        ),
        "weights": _digest(model),
    }


def _digest(model: nn.Module) -> str:
    digest = sha256()
    for name, parameter in model.named_parameters():
        if not name.startswith("scale_bank."):
            digest.update(name.encode())
            digest.update(_bytes(parameter))
    for _, quantizer in _weight_quantizers(model):
        digest.update(_bytes(quantizer.base_scale))
        digest.update(_bytes(quantizer.zero_point))
    return digest.hexdigest()


def _weight_quantizers(model: nn.Module) -> Iterator[tuple[str, WeightQuantizer]]:
    for path, module in model.named_modules():
        if isinstance(module, WeightQuantizer):
            yield path, module


def _bytes(tensor: Tensor) -> Any:
    # numpy has no bfloat16.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise TableFormatError(f"{path} is not a readable checkpoint: {error}.") from error
