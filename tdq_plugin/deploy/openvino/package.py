"""A converted model as a folder: OpenVINO's own files, the scale table, and JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import openvino as ov

from tdq_plugin.deploy.openvino.model import OpenVINOModel
from tdq_plugin.deploy.openvino.report import ConversionReport
from tdq_plugin.deploy.package import read_description
from tdq_plugin.errors import TableFormatError
from tdq_plugin.files import atomic_folder
from tdq_plugin.scales.frozen import FrozenBank
from tdq_plugin.table import load_table

__all__ = ["FORMAT_VERSION", "load_openvino", "read_extra", "save_openvino"]

FORMAT_VERSION = 1
_FORMAT = "tdq-openvino"
_MODEL, _TABLE, _JSON = "openvino_model.xml", "scale_table.safetensors", "quantization.json"


def save_openvino(
    model: OpenVINOModel, folder: str | Path, *, extra: Mapping[str, Any] | None = None
) -> None:
    """Write a converted model as a folder, atomically.

    `openvino_model.xml` and `.bin` are what every OpenVINO runtime reads; `scale_table.safetensors`
    is the table that the model was made from; `quantization.json` holds the rest.

    Args:
        model: From `to_openvino`.
        folder: The folder to create or replace.
        extra: Further facts for `quantization.json`, under the key `extra`; JSON values.
    """
    content = {
        "format": _FORMAT,
        "version": FORMAT_VERSION,
        "lookup": model.bank.lookup,
        "timestep_input": model.timestep_input,
        "mixed_timesteps": model.mixed_timesteps,
        "report": asdict(model.report),
        "extra": dict(extra or {}),
    }
    with atomic_folder(folder, marker=_JSON) as temporary:
        # 16-bit constants would move scales by up to 5e-4.
        ov.save_model(model.model, temporary / _MODEL, compress_to_fp16=False)
        model.bank.table.save(temporary / _TABLE)
        (temporary / _JSON).write_text(json.dumps(content, indent=1) + "\n")


def load_openvino(
    folder: str | Path, *, properties: Mapping[str, Any] | None = None
) -> OpenVINOModel:
    """Read a folder from `save_openvino`.

    Args:
        folder: The folder.
        properties: As for `to_openvino`.

    Raises:
        TableFormatError: A file is missing, truncated, or of an unknown version.
    """
    content = _description(folder)
    try:
        report = ConversionReport(**content["report"])
        timestep, mixed = content["timestep_input"], content["mixed_timesteps"]
        lookup = content["lookup"]
    except (KeyError, TypeError) as error:
        raise TableFormatError(f"{folder}/{_JSON} is not complete: {error!r}.") from error
    bank = FrozenBank(load_table(Path(folder) / _TABLE), lookup)
    path = Path(folder) / _MODEL
    try:
        model = ov.Core().read_model(path)
    except RuntimeError as error:
        raise TableFormatError(f"{path} is not a readable OpenVINO model: {error}.") from error
    return OpenVINOModel(model, bank, timestep, mixed, report, properties)


def read_extra(folder: str | Path) -> dict[str, Any]:
    """What `save_openvino` was given as `extra`.

    Raises:
        TableFormatError: `quantization.json` is missing, not JSON, or of an unknown version.
    """
    extra: dict[str, Any] = _description(folder).get("extra", {})
    return extra


def _description(folder: str | Path) -> dict[str, Any]:
    return read_description(folder, _FORMAT, FORMAT_VERSION, "save_openvino")
