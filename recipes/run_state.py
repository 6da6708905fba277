"""What a run has finished so far, on disk, so that a restart goes on from there."""

import json
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.evaluation.denoiser import Result

__all__ = ["RunState", "check_folder", "check_new_folder", "differences", "read_settings"]


class RunState:
    """Results by method and execution below a run's folder.

    Args:
        folder: The run's folder.
        config: The run's configuration; a folder belongs to one run.
        changeable: Settings that may differ from those that the run began with, by dotted key.

    Raises:
        ConfigError: The folder holds a run with other settings.
    """

    def __init__(
        self, folder: Path, config: dict[str, Any], changeable: Collection[str] = ()
    ) -> None:
        self.folder = folder
        check_folder(folder, config, changeable)
        path = folder / "config.json"
        if not path.exists() or differences(read_settings(path), config):
            _write(path, config)

    def table_path(self, method: str) -> Path:
        """Where a method's scale table is."""
        return self.folder / "tables" / f"{method}.safetensors"

    def weights_path(self, method: str) -> Path:
        """Where the weights are that a method has changed."""
        return self.folder / "weights" / f"{method}.safetensors"

    def correction_path(self, method: str) -> Path:
        """Where a method's output correction is."""
        return self.folder / "corrections" / f"{method}.safetensors"

    def checkpoint_path(self, method: str) -> Path:
        """Where an unfinished training of a method is."""
        return self.folder / "checkpoints" / f"{method}.safetensors"

    def result(self, method: str, execution: str) -> Result | None:
        """The stored result, if the method is finished."""
        path = self._result_path(method, execution)
        if not path.exists():
            return None
        images = load_file(path.with_suffix(".safetensors"))["images"]
        return Result(**json.loads(path.read_text()), images=images)

    def save_result(self, method: str, result: Result, execution: str) -> None:
        """Store a result; the JSON file comes last and marks it as finished."""
        path = self._result_path(method, execution)
        with atomic_file(path.with_suffix(".safetensors")) as temporary:
            save_file({"images": result.images.contiguous()}, temporary)
        _write(path, {key: value for key, value in asdict(result).items() if key != "images"})

    def _result_path(self, method: str, execution: str) -> Path:
        return self.folder / "rows" / f"{method}.{execution}.json"


def check_folder(folder: Path, config: dict[str, Any], changeable: Collection[str] = ()) -> None:
    """See that a run's folder holds no other run; `changeable` settings may differ.

    Raises:
        ConfigError: It does; the message names every setting that differs.
    """
    path = folder / "config.json"
    if path.exists():
        shown = differences(read_settings(path), config, changeable)
        if shown:
            raise ConfigError(
                f"{folder} holds a run with other settings: {shown}. Choose another name=..., or "
                "remove the folder."
            )


def check_new_folder(folder: Path) -> None:
    """See that a folder is not there, for a run that is done in one go and replaces nothing.

    Raises:
        ConfigError: It is.
    """
    if folder.exists():
        raise ConfigError(
            f"{folder} exists. Remove it, or choose another folder: name=..., output=..."
        )


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a run's `config.json`.

    Raises:
        ConfigError: It is damaged.
    """
    try:
        settings: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(
            f"{path} is damaged: {error}. If the run had the settings of this command, remove the "
            "file; otherwise remove the folder."
        ) from error
    return settings


def differences(
    known: dict[str, Any], wanted: dict[str, Any], changeable: Collection[str] = ()
) -> str:
    """Every setting that differs, by its dotted key, but for `changeable` ones.

    Example:
        >>> differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}})
        'a.c=2, not 3'
    """
    known, wanted = _by_dotted_key(known), _by_dotted_key(json.loads(json.dumps(wanted)))
    keys = sorted((known.keys() | wanted.keys()) - set(changeable))
    keys = [key for key in keys if known.get(key) != wanted.get(key)]
    return ", ".join(f"{key}={known.get(key)!r}, not {wanted.get(key)!r}" for key in keys)


def _by_dotted_key(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict)
        values |= _by_dotted_key(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return values


def _write(path: Path, value: Any) -> None:
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2))
