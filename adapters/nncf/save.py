"""An attached NNCF model as a folder: NNCF's hooks as JSON, all tensors as safetensors."""

import json
from pathlib import Path
from typing import Any, TypeVar

import nncf.torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tdq_plugin.attach import attach, scale_bank
from tdq_plugin.errors import TableFormatError, TableMismatchError
from tdq_plugin.files import atomic_folder, recover_folder
from tdq_plugin.freeze import load_scales
from tdq_plugin.scales import FrozenBank, GeneratorBank
from tdq_plugin.scales.bank import BankFactory
from tdq_plugin.table import ScaleTable
from tdq_plugin.timestep import find_timestep_argument

__all__ = ["FORMAT_VERSION", "load_quantized", "save_quantized"]

FORMAT_VERSION = 1
_FORMAT = "tdq-nncf"
_JSON, _TENSORS = "quantization.json", "model.safetensors"
_BANK = "scale_bank."

Model = TypeVar("Model", bound=nn.Module)


def save_quantized(model: nn.Module, folder: str | Path) -> None:
    """Write an attached model, live or frozen, as a folder of two files, atomically.

    Args:
        model: From `prepare` and `attach`.
        folder: The folder to create or replace.

    Raises:
        AdapterError: The model is not attached.
    """
    bank = scale_bank(model)
    content = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "lookup": bank.lookup if isinstance(bank, FrozenBank) else None,
        "nncf": nncf.torch.get_config(model),
    }
    # Hooks that share a module share its tensors, which safetensors refuses.
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    with atomic_folder(folder, marker=_JSON) as temporary:
        save_file(state, temporary / _TENSORS)
        (temporary / _JSON).write_text(json.dumps(content, indent=1) + "\n")


def load_quantized(
    model: Model,
    folder: str | Path,
    bank: BankFactory = GeneratorBank,
    timestep_argument: str | None = None,
) -> Model:
    """Turn a float model into the one that `save_quantized` wrote; in place.

    Args:
        model: The float architecture; its weights are overwritten.
        folder: The folder.
        bank: As for `attach`: makes a bank of the kind that was saved. A frozen model needs none.
        timestep_argument: As for `attach`.

    Returns:
        The model, attached; its outputs are bit-equal to the saved one's.

    Raises:
        TableFormatError: A file is missing, truncated, or of an unknown version.
        TableMismatchError: The folder belongs to another architecture, or to another bank.
        TimestepError: The model's forward has no timestep argument.
    """
    content = _read_json(folder)
    state = _read_tensors(Path(folder) / _TENSORS)
    # Before the model is changed: NNCF cannot hook into it a second time.
    find_timestep_argument(model.forward, timestep_argument)
    _check_architecture(model, state, folder)
    nncf.torch.load_from_config(
        model, content["nncf"], allowed_modules=("nncf.*", "tdq_plugin.adapters.nncf.*")
    )
    attach(model, bank, timestep_argument)
    try:
        if content["lookup"] is not None:
            load_scales(model, _table(model, state), content["lookup"])
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise TableMismatchError(
            f"{folder} belongs to another architecture than this {type(model).__name__}, or to "
            f"another bank than {type(scale_bank(model)).__name__}: {error}. Give the model and "
            "the bank that were saved."
        ) from error
    return model.train(model.training)


def _check_architecture(model: nn.Module, state: dict[str, Tensor], folder: str | Path) -> None:
    for name, tensor in model.state_dict().items():
        if name not in state or state[name].shape != tensor.shape:
            saved = tuple(state[name].shape) if name in state else "missing"
            raise TableMismatchError(
                f"{folder} belongs to another architecture than this {type(model).__name__}: "
                f"{name!r} has shape {tuple(tensor.shape)}, in the folder it is {saved}. Give the "
                "model that was saved."
            )


def _table(model: nn.Module, state: dict[str, Tensor]) -> ScaleTable:
    live = scale_bank(model)
    grids = dict(zip(live.names, live.grids, strict=True))
    tensors = (state[_BANK + name] for name in ("timesteps", "scales", "zero_points"))
    return ScaleTable(grids, *tensors)


def _read_json(folder: str | Path) -> dict[str, Any]:
    recover_folder(folder)
    path = Path(folder) / _JSON
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise TableFormatError(f"{path} is not readable JSON: {error}.") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise TableFormatError(f"{path} is no NNCF model. Give what save_quantized wrote.")
    if content.get("version") != FORMAT_VERSION:
        raise TableFormatError(
            f"{path} has format version {content.get('version')!r}; this release reads version "
            f"{FORMAT_VERSION}. Update tdq-plugin."
        )
    if not {"lookup", "nncf"} <= content.keys():
        raise TableFormatError(f"{path} is not complete: it has {sorted(content)}.")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise TableFormatError(f"{path} is not a readable safetensors file: {error}.") from error
