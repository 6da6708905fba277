"""The figures that a part of a study can ask for, by name."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

from tdq_plugin.studies.definition import FigureName
from tdq_plugin.studies.document import Picture
from tdq_plugin.studies.drawings import (
    distance_dots,
    error_bands,
    histogram,
    lines_over_steps,
    range_bands,
    ratios_over_timesteps,
    scale_histories,
)
from tdq_plugin.studies.results import FinishedRun, Group, Method, row_name
from tdq_plugin.study.figures import error_over_timesteps, sample_grid

__all__ = ["FIGURES", "FigureMaker", "labelled"]

Kept = TypeVar("Kept")
FigureMaker = Callable[[Sequence[Group], Sequence[FinishedRun]], list[Picture]]
LAYERS = 6
REFERENCE = "static LSQ"


def distances(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """Every draw's Fréchet distance to the float model's samples."""
    metric = "frechet_distance_to_float"
    draws = {group.name: _draws(group, metric) for group in groups}
    draws = {name: methods for name, methods in draws.items() if methods}
    if not draws:
        return []
    floors = {group.name: group.noise_floor.get(metric) for group in groups}
    caption = "Every dot is one calibration or training draw; further left is better."
    return [
        Picture("distances", "Fréchet distance, every draw", distance_dots(draws, floors), caption)
    ]


def errors(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """Error along the float model's trajectory, of one draw of each method."""
    pictures = []
    for group in groups:
        curves = _kept(group, lambda run: run.curves)
        if curves:
            pictures.append(
                Picture(
                    f"errors-{group.name}",
                    f"Error along the sampler's way, {group.name}",
                    error_over_timesteps(curves),
                    "Mean squared error of the predicted noise at each timestep of the float "
                    "model's trajectory, of one draw. Sampling runs from right to left.",
                )
            )
    return pictures


def error_ratios(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """Where in time a method is better or worse than static LSQ."""
    pictures = []
    for group in groups:
        ratios = _ratios(group)
        if ratios:
            pictures.append(
                Picture(
                    f"error-ratios-{group.name}",
                    f"Error relative to {REFERENCE} over time, {group.name}",
                    ratios_over_timesteps(ratios, f"error / error of {REFERENCE}"),
                    "Below 1 a method is better there. Thick: geometric mean of the draws; thin: "
                    "each draw.",
                )
            )
    return pictures


def samples(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """Images of the last group's methods, from the same noise."""
    kept = _kept(groups[-1], lambda run: run.images) if groups else {}
    if not kept:
        return []
    float32 = next(run.images[run.FLOAT] for run in groups[-1].runs if run.images)
    png = sample_grid({"float32": float32, **kept}, len(float32))
    caption = f"Every column starts from the same noise. Not chosen: the first {len(float32)}."
    return [Picture("samples", f"Samples, {groups[-1].name}", png, caption)]


def ranges(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """Activation ranges over t, and how they correlate with t."""
    report = _with_layers(runs)
    if report is None:
        return []
    layers = report["layers"]
    moving = sorted(layers, key=lambda name: _movement(layers[name]["deviation"]), reverse=True)
    bands = {name: (layers[name]["low"], layers[name]["high"]) for name in moving[:LAYERS]}
    dynamics = report["temporal_dynamics"]
    label = "|Pearson r| of timestep and standard deviation"
    return [
        Picture(
            "ranges",
            "Activation ranges over time",
            range_bands(report["timesteps"], bands),
            f"The {len(bands)} of {len(layers)} layers whose standard deviation moves most, in the "
            "float model.",
        ),
        Picture(
            "correlations",
            "How closely activations follow t",
            histogram(dynamics["correlation"], label),
            f"Over 0.5 in {dynamics['share_correlated_0_5']:.0%} of the layers, over 0.7 in "
            f"{dynamics['share_correlated_0_7']:.0%}. The standard deviation's largest value over "
            f"its smallest is {dynamics['std_ratio']['median']:.2f} in the median layer and "
            f"{dynamics['std_ratio']['p90']:.2f} in the 90th percentile.",
        ),
    ]


def rounding_errors(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """What one scale for all t costs before anything is trained."""
    report = _with_layers(runs)
    if report is None:
        return []
    values = report["layers"].values()
    kinds = {"one scale for all t": "static_error", "one scale per t": "timestep_error"}
    relative = {name: torch.tensor([layer[key] for layer in values]) for name, key in kinds.items()}
    return [
        Picture(
            "rounding-errors",
            f"Rounding error over time, {report['bits']}",
            error_bands(report["timesteps"], relative),
            "Each layer's rounding and clipping error relative to the mean square of its values. "
            "Line: median layer; band: the middle half of the layers.",
        )
    ]


def steps(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """Quality over the number of sampler steps."""
    pictures = []
    for metric, label in {
        "frechet_distance": "Fréchet distance to data",
        "trajectory_mse": "trajectory error",
    }.items():
        curves: dict[str, dict[int, list[float]]] = {}
        for group in groups:
            for name, method in labelled(group.methods).items():
                values = [value for value in method.values(metric).values() if value > 0]
                if values:
                    curves.setdefault(name, {})[int(group.name)] = values
        if not curves:
            continue
        caption = "The same trained models at every number of steps; only their table is frozen "
        caption += "for other timesteps."
        title = f"{label[0].upper()}{label[1:]} over sampler steps"
        file = f"steps-{metric.replace('_', '-')}"
        pictures.append(Picture(file, title, lines_over_steps(curves, label), caption))
    return pictures


def training(groups: Sequence[Group], runs: Sequence[FinishedRun]) -> list[Picture]:
    """The scale functions at several moments of the training."""
    history = next((run.scales for run in runs if run.scales is not None), None)
    if history is None:
        return []
    by_step = {
        step: dict(zip(history.layers, scales.T.tolist(), strict=True))
        for step, scales in history.scales.items()
    }
    return [
        Picture(
            "training",
            "Scales over time during training",
            scale_histories(history.timesteps.tolist(), by_step, history.layers),
            f"The {len(history.layers)} layers whose learned scale moves most over t. After 0 "
            "steps, the generators follow the ranges that calibration saw.",
        )
    ]


FIGURES: dict[FigureName, FigureMaker] = {
    "distances": distances,
    "errors": errors,
    "error_ratios": error_ratios,
    "samples": samples,
    "ranges": ranges,
    "rounding_errors": rounding_errors,
    "steps": steps,
    "training": training,
}


def _quantized(group: Group) -> dict[str, Method]:
    return labelled([method for method in group.methods if method.execution != "float32"])


def labelled(methods: Sequence[Method]) -> dict[str, Method]:
    """Methods by title; one that ran both on integers and simulated is there twice."""
    rows = Counter(method.title for method in methods)
    return {
        f"{method.title}, simulated"
        if rows[method.title] > 1 and method.execution == "fake"
        else method.title: method
        for method in methods
    }


def _draws(group: Group, metric: str) -> dict[str, list[float]]:
    """By method, the draws of a metric, if it was measured."""
    found = {name: list(m.values(metric).values()) for name, m in _quantized(group).items()}
    return {name: values for name, values in found.items() if values}


def _kept(group: Group, of: Callable[[FinishedRun], Mapping[str, Kept]]) -> dict[str, Kept]:
    """What the first draw of each method has of something, if a draw has kept it."""
    found: dict[str, Kept] = {}
    for title, method in _quantized(group).items():
        for run, row in method.draws.values():
            if row_name(row) in of(run):
                found.setdefault(title, of(run)[row_name(row)])
    return found


def _ratios(group: Group) -> dict[str, list[dict[float, float]]]:
    """By method and draw, the error over that of the reference's same draw at each timestep."""
    found: dict[str, list[dict[float, float]]] = {}
    methods = _quantized(group)
    reference = _curves(methods.pop(REFERENCE, None))
    for title, method in methods.items():
        for seed, errors_of in _curves(method).items():
            below = reference.get(seed, {})
            ratios = {t: error / below[t] for t, error in errors_of.items() if below.get(t)}
            if ratios:
                found.setdefault(title, []).append(ratios)
    return found


def _curves(method: Method | None) -> dict[int, dict[float, float]]:
    """By seed, the error at each timestep, where a draw has kept it."""
    draws = method.draws if method else {}
    return {
        seed: dict(zip(*run.curves[row_name(row)], strict=True))
        for seed, (run, row) in draws.items()
        if row_name(row) in run.curves
    }


def _with_layers(runs: Sequence[FinishedRun]) -> Mapping[str, Any] | None:
    """The report of the first run that measured ranges."""
    return next((run.report for run in runs if "layers" in run.report), None)


def _movement(deviation: Sequence[float]) -> float:
    return max(deviation) / max(min(deviation), 1e-12)
