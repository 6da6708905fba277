"""Measure how activation ranges move over t, and the rounding error of one scale for all t.

What is decided here: each layer's static scale is the best one for all timesteps together, its own
scale of each timestep the best one there, both with the same zero point. So the difference is what
timestep-dependent scales can win before anything is trained.
"""

import json
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

import tdq_plugin as tdq
from tdq_plugin.files import atomic_file
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.observe import Observation
from tdq_plugin.ranges import rounding_error, search_range, search_scale
from tdq_plugin.recipes.bits import Bits, BitsName
from tdq_plugin.recipes.calibration import TrajectorySection, collect, observe, placeholder
from tdq_plugin.recipes.config import ASSETS, RecipeConfig, filled_in
from tdq_plugin.recipes.evaluation.sampling import scheduler_with
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.report_parts import command, dynamics, versions
from tdq_plugin.recipes.run_state import RunState, check_folder

__all__ = ["RangesConfig", "plan", "run"]

RECIPE = "ddim-digits-ranges"
MODEL = ASSETS / "ddim-digits"
SHOWN_QUANTILES = (0.001, 0.999)


class RangesConfig(RecipeConfig):
    """Configuration of `ddim-digits-ranges`.

    Attributes:
        bits: Bits of weights and activations; the first and last layer keep 8.
        steps: Steps of the DDIM sampler whose trajectories are followed.
        calibration: How many of them.
        model: Folder of the float model, a saved diffusers pipeline.
    """

    bits: BitsName
    steps: int = Field(ge=2, le=500)
    calibration: TrajectorySection
    model: str = str(MODEL)

    @property
    def run_folder(self) -> Path:
        """Where the results go; `{bits}`, `{steps}` and `{seed}` are filled in."""
        filled = self.model_dump(include={"bits", "steps", "seed"})
        return self.output / filled_in(self.name, **filled)


def plan(config: RangesConfig) -> Plan:
    """Check run folder and model, and say what a run would do."""
    check_folder(config.run_folder, config.model_dump(mode="json"), config.changeable)
    model = load_float_model(config.model)
    scheduler_with(model.scheduler, config.steps)
    framework = load_framework("torch_ao")
    quantized = framework.prepare(model.unet, placeholder(model), Bits.parse(config.bits))
    lines = {
        "model": f"{config.model}, {model.describe()}",
        "quantizers": f"{len(tdq.scale_bank(quantized).names)} activations, {config.bits}",
        "observed": f"{config.calibration.images} trajectories of {config.steps} DDIM steps",
        "results": str(config.run_folder),
    }
    return Plan(f"tdq run {RECIPE}", lines)


def run(config: RangesConfig) -> Path:
    """Measure, write `report.json`, print the summary; return the folder."""
    torch.set_num_threads(config.threads)
    state = RunState(config.run_folder, config.model_dump(mode="json"), config.changeable)
    model = load_float_model(config.model)
    points = collect(config.calibration.of_the_sampler(), model, config.steps, config.seed)
    quantized = load_framework("torch_ao").prepare(model.unet, points, Bits.parse(config.bits))
    observations = observe(quantized, points, model.scheduler, config.steps)
    bank = tdq.scale_bank(quantized)
    grids = dict(zip(bank.names, bank.grids, strict=True))
    moving = dynamics(observations)
    report = {
        "recipe": RECIPE,
        "command": command(RECIPE, config),
        "seed": config.seed,
        "bits": config.bits,
        "versions": versions("tdq-plugin", "torch", "diffusers"),
        "timesteps": next(iter(observations.values())).timesteps.tolist(),
        "layers": {name: _layer(seen, grids[name]) for name, seen in observations.items()},
        "temporal_dynamics": moving,
    }
    with atomic_file(state.folder / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n")
    _print_summary(moving)
    return state.folder


def _layer(seen: Observation, grid: QuantizationGrid) -> dict[str, list[float]]:
    """What is seen of one layer at each timestep; errors are relative to the mean square there."""
    power = seen.values.square().mean(dim=1).clamp_min(1e-30)
    limits = torch.stack([seen.limits[:, 0].min(), seen.limits[:, 1].max()])[None]
    scale, zero_point = search_range(seen.values.reshape(1, -1), grid, limits=limits)
    scale, zero_point = scale.expand(len(power)), zero_point.expand(len(power))
    best = search_scale(seen.values, zero_point, grid, limits=seen.limits)
    # The search tries a grid of scales; the static one may lie between them.
    static_error = rounding_error(seen.values, scale, zero_point, grid)
    best_error = rounding_error(seen.values, best, zero_point, grid).minimum(static_error)
    low, high = seen.values.quantile(torch.tensor(SHOWN_QUANTILES), dim=1)
    measured: dict[str, Tensor] = {
        "low": low,
        "high": high,
        "deviation": seen.deviation,
        "static_error": static_error / power,
        "timestep_error": best_error / power,
    }
    return {name: values.tolist() for name, values in measured.items()}


def _print_summary(moving: dict[str, Any]) -> None:
    ratio = moving["std_ratio"]
    print(
        f"{moving['layers']} layers, {moving['timesteps']} timesteps. Standard deviation, largest "
        f"over smallest: median {ratio['median']:.2f}, 90th percentile {ratio['p90']:.2f}. "
        f"|r| with t over 0.5 in {moving['share_correlated_0_5']:.0%} of the layers, over 0.7 in "
        f"{moving['share_correlated_0_7']:.0%}."
    )
