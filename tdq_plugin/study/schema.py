"""What `report.json` contains, and the check that a report contains it."""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, TypedDict

from tdq_plugin.errors import ConfigError
from tdq_plugin.study.dynamics import TemporalDynamics

__all__ = [
    "HIGHER_IS_BETTER",
    "METRICS",
    "Latency",
    "Report",
    "ReportRow",
    "SizeBytes",
    "metric_of",
    "validate_report",
]

METRICS = (
    "trajectory_mse",
    "trajectory_mse_unseen",
    "t0_mse",
    "step_mse",
    "pixel_mse",
    "frechet_distance",
    "frechet_distance_to_float",
    "classifier_score",
)
HIGHER_IS_BETTER = ("classifier_score",)
EXECUTIONS = ("float32", "fake", "int8")


class _RequiredRow(TypedDict):
    method: str
    execution: Literal["float32", "fake", "int8"]
    trajectory_mse: float | None
    step_mse: float | None
    pixel_mse: float | None
    frechet_distance: float | None
    frechet_distance_to_float: float | None
    samples: int
    feature_space: str


class ReportRow(_RequiredRow, total=False):
    """One method. A metric that was not measured, or has no meaning, is `None`.

    Attributes:
        method: Name of the method.
        key: Its name in the configuration, and in the file names of the run.
        execution: `float32` for the unquantized model, `fake` for simulated quantization in
            float32, `int8` for integer kernels.
        trajectory_mse: Mean squared epsilon error against the float model along the float model's
            own sampling trajectory, without t = 0.
        trajectory_mse_unseen: The same on timesteps that calibration never saw.
        t0_mse: The same at t = 0 alone, where it is far larger and matters least.
        step_mse: Mean squared error of the sample after one sampler step from the float model's.
        pixel_mse: Mean squared difference of final images from the same noise to the float model's.
        frechet_distance: Fréchet distance to real images in `feature_space`.
        frechet_distance_to_float: Fréchet distance to the float model's samples.
        classifier_score: `classifier_score` of the images; higher is better.
        samples: Number of images behind the last four.
        feature_space: The network whose features were compared.
    """

    key: str
    trajectory_mse_unseen: float | None
    t0_mse: float | None
    classifier_score: float | None


class Latency(TypedDict):
    """Time of one forward pass, in `unit`; `None` if not measured."""

    float32: float | None
    static_int8: float | None
    tdq_int8: float | None
    dynamic_int8: float | None
    unit: str


class SizeBytes(TypedDict):
    """Size of the float and of the saved model in bytes; None if none was saved."""

    float32: int
    int8: int | None


class _RequiredReport(TypedDict):
    recipe: str
    seed: int
    bits: str
    versions: dict[str, str]
    rows: list[ReportRow]
    latency: Latency
    size_bytes: SizeBytes


class Report(_RequiredReport, total=False):
    """The whole of `report.json`. Further keys are kept in the file but not shown on the page.

    Attributes:
        recipe: Name of the recipe.
        seed: Seed of every draw.
        bits: `W<weight bits>A<activation bits>`.
        versions: Version of each package that matters.
        rows: One per method.
        latency: Speed of the float, static, TDQ and input-dependent models.
        size_bytes: Size of the float and the integer model.
        command: What to run to get this report again.
        methods: One plain sentence about each method.
        notes: Paragraphs on what this run does and does not show.
        noise_floor: The metrics of the float model against itself, from other noise.
        temporal_dynamics: `TemporalDynamics.as_dict()` of the float model.
    """

    command: str
    methods: dict[str, str]
    notes: list[str]
    noise_floor: dict[str, float]
    temporal_dynamics: dict[str, Any]


def metric_of(row: ReportRow, metric: str) -> float | None:
    """Return one of a row's `METRICS`, or None if it was not measured."""
    value: float | None = row.get(metric)  # type: ignore[assignment]
    return value


def validate_report(report: Report) -> None:
    """Check that a report has every required key and can be written as JSON.

    Raises:
        ConfigError: A key is missing, or a value is not one the schema allows.

    Example:
        >>> validate_report({"recipe": "mine", "seed": 0, "bits": "W8A4"})
        Traceback (most recent call last):
        ...
        tdq_plugin.errors.ConfigError: The report lacks latency, rows, size_bytes, versions.
    """
    _require("The report", report, Report.__required_keys__)
    _require("latency", report["latency"], Latency.__required_keys__)
    _require("size_bytes", report["size_bytes"], SizeBytes.__required_keys__)
    for part, size in report["size_bytes"].items():
        if part == "int8" and size is None:
            continue
        if not isinstance(size, int) or size <= 0:
            raise ConfigError(f"size_bytes.{part} = {size!r} is not a positive number of bytes.")
    if not re.fullmatch(r"W\d+A\d+", report["bits"]):
        raise ConfigError(f"bits = {report['bits']!r} is not of the form W8A4.")
    if not report["rows"]:
        raise ConfigError("The report has no rows. Give one row per method.")
    for index, row in enumerate(report["rows"]):
        _check_row(f"rows[{index}]", row)
    for metric in report.get("noise_floor", {}):
        if metric not in METRICS:
            raise ConfigError(f"noise_floor.{metric} is not one of {', '.join(METRICS)}.")
    if "temporal_dynamics" in report:
        expected = frozenset(field.name for field in fields(TemporalDynamics))
        _require("temporal_dynamics", report["temporal_dynamics"], expected)
    _check_leaves("", report)


def _check_row(where: str, row: ReportRow) -> None:
    _require(where, row, ReportRow.__required_keys__)
    if row["execution"] not in EXECUTIONS:
        raise ConfigError(f"{where}.execution = {row['execution']!r} is not one of {EXECUTIONS}.")
    for metric in METRICS:
        value = metric_of(row, metric)
        if value is not None and not isinstance(value, int | float):
            raise ConfigError(f"{where}.{metric} = {value!r} is not a number or None.")


def _require(where: str, values: Mapping[str, Any], keys: frozenset[str]) -> None:
    missing = sorted(keys - values.keys())
    if missing:
        raise ConfigError(f"{where} lacks {', '.join(missing)}.")


def _check_leaves(path: str, value: Any) -> None:
    """Check that everything below `value` can be written as JSON."""
    if isinstance(value, Mapping):
        for key, below in value.items():
            _check_leaves(f"{path}.{key}" if path else str(key), below)
    elif isinstance(value, list | tuple):
        for index, below in enumerate(value):
            _check_leaves(f"{path}[{index}]", below)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} = {value} is not finite. Write None if there is no value.")
    elif not isinstance(value, str | int | float | None):
        raise ConfigError(f"{path} is a {type(value).__name__}. Give plain numbers and strings.")
