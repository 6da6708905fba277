"""What the finished runs of a study have left."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.studies.definition import Part
from tdq_plugin.study.schema import METRICS

__all__ = [
    "Curve",
    "FinishedRun",
    "Group",
    "Method",
    "ScaleHistory",
    "group_name",
    "groups_of",
    "row_name",
    "same_draw",
]


class Curve(NamedTuple):
    """Timesteps of the sampler, and a row's error at each of them."""

    timesteps: list[float]
    errors: list[float]


class ScaleHistory(NamedTuple):
    """Scales during the training.

    Attributes:
        layers: Names of K quantizers.
        timesteps: Shape `(T,)`.
        scales: By training step, shape `(T, K)`.
    """

    layers: list[str]
    timesteps: Tensor
    scales: dict[int, Tensor]


@dataclass(frozen=True)
class FinishedRun:
    """What reports need of a run; curves, images and scales as far as they were kept.

    Attributes:
        name: Its name in the study.
        config: Its configuration.
        report: Its `report.json`.
        curves: By `row_name`.
        images: The first images by `row_name`, in [-1, 1], shape `(N, C, H, W)`; all from the same
            noise, the float model's as `FLOAT`.
        scales: Those of TDQ.
    """

    FLOAT: ClassVar[str] = "float32"

    name: str
    config: Mapping[str, Any]
    report: Mapping[str, Any]
    curves: Mapping[str, Curve]
    images: Mapping[str, Tensor]
    scales: ScaleHistory | None


def row_name(row: Mapping[str, Any]) -> str:
    """Name of a report's row in its run."""
    return f"{row.get('key', row['method'])}.{row['execution']}"


@dataclass(frozen=True)
class Method:
    """The rows of one method and execution in one group, by seed, each with the run it is from."""

    title: str
    execution: str
    draws: Mapping[int, tuple[FinishedRun, Mapping[str, Any]]]

    def values(self, metric: str) -> dict[int, float]:
        """A metric by seed, where it was measured."""
        found = {seed: row.get(metric) for seed, (_, row) in self.draws.items()}
        return {seed: value for seed, value in found.items() if value is not None}


@dataclass(frozen=True)
class Group:
    """Runs that can be compared with each other: of the same bits, or the same sampler steps."""

    name: str
    runs: tuple[FinishedRun, ...]

    @cached_property
    def methods(self) -> tuple[Method, ...]:
        """In the order of their first appearance, the float model first.

        Raises:
            ConfigError: Two runs have the same method with the same seed.
        """
        draws: dict[tuple[str, str], dict[int, Any]] = {}
        for run in self.runs:
            for row in run.report["rows"]:
                found = draws.setdefault((row["method"], row["execution"]), {})
                other, _ = found.setdefault(run.config["seed"], (run, row))
                if other is not run and row["execution"] != "float32":
                    seed = run.config["seed"]
                    raise ConfigError(same_draw(run.name, other.name, row["method"], seed))
        return tuple(Method(*key, found) for key, found in draws.items())

    @property
    def noise_floor(self) -> Mapping[str, float]:
        """Metrics of the float model against itself, from other noise."""
        floors = (run.report.get("noise_floor") for run in self.runs)
        return next((floor for floor in floors if floor), {})

    def measured(self) -> list[str]:
        """The metrics that some row has."""
        return [metric for metric in METRICS if any(m.values(metric) for m in self.methods)]


def same_draw(run: str, other: str, method: str, seed: int) -> str:
    """What is wrong with two runs of a group that have the same method with the same seed."""
    return (
        f"{run} and {other} both have {method!r} with seed {seed}. Set group_by to what differs in "
        "them."
    )


def groups_of(part: Part, runs: Iterable[FinishedRun]) -> list[Group]:
    """Divide a part's runs by `group_by`, in the order of their appearance.

    Raises:
        ConfigError: A run has no setting of that name.
    """
    by_name: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if "rows" in run.report:
            by_name.setdefault(group_name(part, run.name, run.config), []).append(run)
    return [Group(name, tuple(found)) for name, found in by_name.items()]


def group_name(part: Part, run: str, config: Mapping[str, Any]) -> str:
    """The group that a run belongs to.

    Args:
        part: What compares the runs.
        run: Its name.
        config: Its configuration.

    Raises:
        ConfigError: It has no setting of the name `part.group_by`.
    """
    value: Any = config
    for key in part.group_by.split(".") if part.group_by else ():
        if not isinstance(value, Mapping) or key not in value:
            raise ConfigError(f"group_by = {part.group_by!r} is no setting of {run}.")
        value = value[key]
    return str(value) if part.group_by else ""
