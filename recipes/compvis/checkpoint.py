"""Read a checkpoint of CompVis' latent-diffusion: safetensors, or as PyTorch Lightning saves it."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tdq_plugin.errors import ConfigError

__all__ = ["read_checkpoint"]


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """All tensors of the model, by CompVis' names.

    Args:
        path: A `.safetensors` file, or a file that `torch.save` wrote: a state dict, or a
            dictionary with one under `state_dict`.

    Raises:
        ConfigError: There is no such file, or it cannot be read without running code in it.
    """
    if not path.is_file():
        raise ConfigError(f"checkpoint = {str(path)!r}: there is no such file.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    loaded = _read_without_classes(path)
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict):
        raise ConfigError(
            f"checkpoint = {str(path)!r} holds a {type(loaded).__name__} that is no state dict."
        )
    return {name: value for name, value in tensors.items() if isinstance(value, Tensor)}


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ConfigError(
            f"checkpoint = {str(path)!r} is not a readable safetensors file: {error}."
        ) from error


def _read_without_classes(path: Path) -> object:
    """What the file holds; objects of other packages in it would run their code when loaded."""
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    # What is raised depends on where the file stops making sense to torch.
    except Exception as error:
        raise ConfigError(
            f"checkpoint = {str(path)!r}: torch.load(weights_only=True) refuses it, because it is "
            "damaged or holds more than tensors, such as PyTorch Lightning's callbacks. If you "
            "trust it, load it with weights_only=False where the packages that it names are "
            "installed, write its `state_dict` with safetensors.torch.save_file, and import that "
            "file."
        ) from error
