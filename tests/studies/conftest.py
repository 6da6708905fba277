"""Runs that nobody ran: what a recipe leaves, with numbers that are known."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers_models import one_level_unet
from safetensors.torch import save_file

from tdq_plugin.recipes.config import RECIPES
from tdq_plugin.studies.results import FinishedRun
from tdq_plugin.studies.run_folder import load_run


def row(
    method: str, key: str, execution: str, error: float, distance: float | None
) -> dict[str, Any]:
    return {
        "method": method,
        "key": key,
        "execution": execution,
        "trajectory_mse": error,
        "frechet_distance": None if distance is None else distance + 1,
        "frechet_distance_to_float": distance,
        "classifier_score": 7.0 - error,
        "samples": 2000,
        "feature_space": "64 features",
    }


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float model of the runs."""
    folder = tmp_path_factory.mktemp("float") / "pipeline"
    DDIMPipeline(one_level_unet(sample_size=16), DDIMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture
def make_run(tmp_path: Path, pipeline: Path) -> Callable[..., FinishedRun]:
    """Leave what a run leaves; methods map a title to (key, execution, error, distance)."""

    def make(
        name: str, bits: str, seed: int, methods: Mapping[str, tuple[str, str, float, float]]
    ) -> FinishedRun:
        folder = tmp_path / "runs" / name
        (folder / "rows").mkdir(parents=True)
        rows = [row("float32", "float32", "float32", 0.0, None)]
        for title, (key, execution, error, distance) in methods.items():
            rows.append(row(title, key, execution, error, distance))
            curve = {"timesteps": [750.0, 0.0], "errors": [error, 10 * error]}
            stored = folder / "rows" / f"{key}.{execution}"
            stored.with_name(stored.name + ".json").write_text(json.dumps(curve))
            images = {"images": torch.full((16, 1, 16, 16), error)}
            save_file(images, stored.with_name(stored.name + ".safetensors"))
        report = {
            "rows": rows,
            "noise_floor": {"frechet_distance_to_float": 0.5},
            "command": f"tdq run demo seed={seed} model={RECIPES}/assets/mine",
        }
        evaluation = {"samples": 100, "trajectories": 1, "seed": 9}
        config = {"bits": bits, "steps": 2, "seed": seed}
        config |= {"model": str(pipeline), "evaluation": evaluation}
        (folder / "report.json").write_text(json.dumps(report))
        (folder / "config.json").write_text(json.dumps(config))
        return load_run(folder)

    return make


@pytest.fixture
def three_draws(make_run: Callable[..., FinishedRun]) -> list[FinishedRun]:
    """TDQ and LSQ in three draws, MinMax in one; TDQ's middle distance is not its mean."""
    draws = [(0.8, 1.0, 4.0, 5.0), (0.6, 1.0, 2.0, 4.0), (1.0, 1.6, 9.0, 6.0)]
    runs = []
    for seed, (tdq, lsq, near, far) in enumerate(draws):
        methods = {"TDQ": ("tdq", "int8", tdq, near), "static LSQ": ("lsq", "int8", lsq, far)}
        if seed == 0:
            methods["MinMax"] = ("minmax", "int8", 3.0, 30.0)
        runs.append(make_run(f"w4a4-{seed}", "W4A4", seed, methods))
    return runs
