"""Read what a recipe's run has left in its folder."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tdq_plugin.recipes.config import RECIPES
from tdq_plugin.recipes.evaluation.digits_evaluation import EvaluationSection, float_images
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.studies.results import Curve, FinishedRun, ScaleHistory, row_name
from tdq_plugin.table import load_table

__all__ = ["load_run", "read_report"]

# What figures show of a run.
IMAGES = 16
LAYERS = 6
TIMESTEPS_APART = 8


def load_run(folder: Path) -> FinishedRun:
    """Read a finished run; of images and scales, what figures show."""
    config, report = json.loads((folder / "config.json").read_text()), read_report(folder)
    curves, images = {}, {}
    for row in report.get("rows", []):
        name = row_name(row)
        stored = folder / "rows" / f"{name}.json"
        if stored.exists():
            curves[name] = _curve(stored)
            images[name] = _first_images(folder / "rows" / f"{name}.safetensors")
    if images:
        images[FinishedRun.FLOAT] = _float_images(config, folder.parent)
    return FinishedRun(folder.name, config, report, curves, images, _scales(folder / "scales"))


def read_report(folder: Path) -> dict[str, Any]:
    """What a finished run reports; its command names models of the package as a checkout does."""
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    report["command"] = report["command"].replace(f"{RECIPES}/", "recipes/")
    return report


def _curve(path: Path) -> Curve:
    stored = json.loads(path.read_text())
    return Curve(stored["timesteps"], stored["errors"])


def _first_images(path: Path) -> Tensor:
    with safe_open(str(path), framework="pt") as file:
        images: Tensor = file.get_slice("images")[:IMAGES]
    return images


def _float_images(config: dict[str, Any], runs: Path) -> Tensor:
    """From the noise that the quantized models start from; drawn again if they were not kept."""
    evaluation, folder = EvaluationSection(**config["evaluation"]), Path(config["model"])
    model = load_float_model(folder)
    images = float_images(evaluation, config["steps"], model, folder, runs / "float-images")
    return images[:IMAGES]


def _scales(folder: Path) -> ScaleHistory | None:
    """TDQ's scales at several moments of the training, of the layers where they move most."""
    tables = {int(path.stem): load_table(path) for path in folder.glob("tdq/*.safetensors")}
    if not tables:
        return None
    last = tables[max(tables)]
    movement = last.scales.amax(dim=0) / last.scales.amin(dim=0)
    columns = movement.argsort(descending=True)[:LAYERS]
    shown = slice(None, None, TIMESTEPS_APART if len(last.timesteps) > 100 else 1)
    return ScaleHistory(
        [last.names[column] for column in columns.tolist()],
        last.timesteps[shown],
        {step: table.scales[shown, columns] for step, table in sorted(tables.items())},
    )
