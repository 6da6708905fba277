"""What is kept of a finished run: one small file, from which the report can be made again.

With the files of a study beside its report, another machine knows what is finished, without
weights, checkpoints and thousands of images.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.config import RECIPES
from tdq_plugin.studies.results import Curve, FinishedRun, ScaleHistory

__all__ = ["load_record", "portable", "save_record"]

FORMAT = {"format": "tdq-study-run", "version": "1"}


def save_record(path: Path, run: FinishedRun) -> None:
    """Write a run, atomically; images with 8 bits, the configuration without this machine's paths.

    Args:
        path: The file, a safetensors file whose metadata are the numbers.
        run: From its folder.
    """
    curves = {name: list(curve) for name, curve in run.curves.items()}
    texts: dict[str, Any] = {"config": portable(run.config), "report": run.report}
    texts["curves"] = curves
    tensors = {f"images.{name}": _to_bytes(images) for name, images in run.images.items()}
    if run.scales is not None:
        texts["layers"] = run.scales.layers
        tensors["timesteps"] = run.scales.timesteps
        tensors |= {f"scales.{step}": value for step, value in run.scales.scales.items()}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, FORMAT | {key: json.dumps(v) for key, v in texts.items()})


def load_record(path: Path) -> FinishedRun:
    """Read what `save_record` wrote.

    Raises:
        ConfigError: It is no such file.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        found = {key: metadata[key] for key in FORMAT}
        texts = {key: json.loads(metadata[key]) for key in metadata.keys() - FORMAT.keys()}
        run = FinishedRun(
            path.stem,
            texts["config"],
            texts["report"],
            {name: Curve(*curve) for name, curve in texts["curves"].items()},
            {key: _from_bytes(value) for key, value in _below("images.", tensors).items()},
            _scales(texts, tensors),
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no record of a run: {error!r}. Remove it; the run is then done again."
        ) from error
    if found != FORMAT:
        raise ConfigError(
            f"{path} is no record of a run that this release reads: it is {found}, not {FORMAT}. "
            "Update tdq-plugin, or remove the file; the run is then done again."
        )
    return run


def portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's configuration without paths of one machine: its output, and what lies below it.

    Example:
        >>> portable({"seed": 1, "output": "/here/runs", "trained": "/here/runs/first"})
        {'seed': 1, 'trained': '{runs}/first'}
    """
    folders = {str(RECIPES): "{recipes}", str(config.get("output", RECIPES)): "{runs}"}
    kept = {key: value for key, value in config.items() if key != "output"}
    for folder, word in folders.items():
        for key, value in kept.items():
            if isinstance(value, str) and value.startswith(f"{folder}/"):
                kept[key] = word + value.removeprefix(folder)
    return kept


def _scales(texts: dict[str, Any], tensors: dict[str, Tensor]) -> ScaleHistory | None:
    if "layers" not in texts:
        return None
    steps = {int(step): value for step, value in _below("scales.", tensors).items()}
    return ScaleHistory(texts["layers"], tensors["timesteps"], dict(sorted(steps.items())))


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _to_bytes(images: Tensor) -> Tensor:
    return (images.clamp(-1, 1).add(1).mul(127.5)).round().to(torch.uint8)


def _from_bytes(images: Tensor) -> Tensor:
    return images.float().div(127.5).sub(1)
