"""Turn the results of a PTQ recipe into the saved model, `report.json` and `report.html`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import tdq_plugin as tdq
from tdq_plugin.observe import Observation
from tdq_plugin.ranges import search_scale
from tdq_plugin.recipes.correction import NOTE
from tdq_plugin.recipes.evaluation.denoiser import Evaluator, Result
from tdq_plugin.recipes.evaluation.image_quality import FEATURE_SPACES
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.recipes.ptq.latency import measure_latency
from tdq_plugin.recipes.ptq.method_states import MethodStates
from tdq_plugin.recipes.ptq.methods import METHODS
from tdq_plugin.recipes.ptq.quantize import Start
from tdq_plugin.recipes.report_parts import command, dynamics, versions
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.recipes.saved_model import save_model
from tdq_plugin.study import write_report
from tdq_plugin.study.figures import error_over_timesteps, sample_grid, scale_curves
from tdq_plugin.study.schema import Report, ReportRow

if TYPE_CHECKING:
    from tdq_plugin.recipes.ptq.comparison import ComparisonRun
    from tdq_plugin.recipes.ptq.config import PTQConfig

__all__ = ["write_results"]

SHOWN = ("minmax", "lsq", "tdq", "tdq_corrected")


def write_results(recipe: str, run: "ComparisonRun", start: Start, states: MethodStates) -> Path:
    """Save the TDQ model, time it, and write the report; return the run's folder."""
    config, state, evaluator = run.config, run.state, run.evaluator
    sizes = save_model(
        run.framework,
        states.load("tdq"),
        state.folder / "model",
        run.model.unet,
        evaluator.scheduler,
        {"recipe": recipe, "bits": config.bits, "steps": config.steps},
        state.correction_path("tdq") if "tdq" in config.correction.methods else None,
    )
    report: Report = {
        "recipe": recipe,
        "command": command(recipe, config),
        "seed": config.seed,
        "bits": config.bits,
        "versions": versions("tdq-plugin", "torch", "diffusers", "torchmetrics"),
        "rows": _rows(config, state, evaluator),
        "methods": {METHODS[name].title: METHODS[name].description for name in config.methods},
        "notes": _notes(config, run.framework),
        "latency": measure_latency(run, start, states),
        "size_bytes": sizes,
        "noise_floor": evaluator.noise_floor(),
        "temporal_dynamics": dynamics(start.observations),
    }
    write_report(state.folder, report, _figures(config, state, start.observations, evaluator))
    return state.folder


def _notes(config: "PTQConfig", framework: Framework) -> list[str]:
    if config.learns_rounding(framework):
        rounding = "Every trained method learns the rounding of the weights with its scales."
    else:
        own = [METHODS[name].title for name in config.methods if METHODS[name].weights is not None]
        but = f", but {', '.join(own)}, whose weights have their own ranges" if own else ""
        rounding = f"All methods share the same weights, rounded to nearest{but}."
    return [rounding, *([NOTE] if config.correction.methods else [])]


def _rows(config: "PTQConfig", state: RunState, evaluator: Evaluator) -> list[ReportRow]:
    common = {"samples": config.evaluation.samples, "feature_space": FEATURE_SPACES["digits"]}
    rows: list[Any] = [
        {"method": "float32", "execution": "float32", **evaluator.float_metrics(), **common}
    ]
    for name, title in config.rows.items():
        for execution in ("int8", "fake"):
            result = state.result(name, execution)
            if result is not None:
                measured = {**result.metrics, **common}
                row = {"method": title, "key": name, "execution": execution}
                rows.append(row | measured)
    return rows


def _any_result(state: RunState, name: str) -> Result:
    result = state.result(name, "int8") or state.result(name, "fake")
    assert result is not None
    return result


def _figures(
    config: "PTQConfig", state: RunState, observations: dict[str, Observation], evaluator: Evaluator
) -> dict[str, tuple[bytes, str]]:
    figures = {
        "Samples from the same noise": (
            _grid(config, state, evaluator),
            "Every column starts from the same noise. A method is good where its digits are those "
            "of the float model.",
        ),
        "Error along the sampler's way": (
            _errors(config, state),
            "Mean squared error of the predicted noise at each timestep of the float model's "
            "trajectory. Sampling runs from right to left.",
        ),
    }
    figures["Scales over time"] = (
        _curves(state, observations),
        "The six layers whose best scales move most. Points: the scale with the least "
        "rounding error at each timestep. Line: what TDQ learned. Dashed: static LSQ.",
    )
    return figures


def _grid(config: "PTQConfig", state: RunState, evaluator: Evaluator) -> bytes:
    rows: dict[str, Tensor] = {"float32": evaluator.images}
    for name in SHOWN:
        if name in config.rows:
            rows[config.rows[name]] = _any_result(state, name).images
    return sample_grid(rows, columns=16)


def _errors(config: "PTQConfig", state: RunState) -> bytes:
    curves = {}
    for name in config.methods:
        result = _any_result(state, name)
        curves[METHODS[name].title] = (result.timesteps, result.errors)
    return error_over_timesteps(curves)


def _curves(state: RunState, observations: dict[str, Observation]) -> bytes:
    learned = tdq.load_table(state.table_path("tdq"))
    static = tdq.load_table(state.table_path("lsq"))
    observed = []
    for name, grid in learned.grids.items():
        seen = observations[name]
        zero_point = learned.zero_points[0, learned.names.index(name)].expand(len(seen.timesteps))
        observed.append(search_scale(seen.values, zero_point, grid, limits=seen.limits))
    return scale_curves(
        learned.timesteps,
        learned.scales,
        next(iter(observations.values())).timesteps,
        torch.stack(observed, dim=1),
        static.scales[0],
        list(learned.names),
    )
