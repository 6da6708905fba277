"""What the finished runs of a study have left."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.digits_evaluation import EvaluationSection, float_images
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.studies.definition import Part
from tdq_plugin.study.schema import METRICS

__all__ = ["FinishedRun", "Group", "Method", "groups_of", "load_run"]


@dataclass(frozen=True)
class FinishedRun:
    """A run's folder, its configuration and its `report.json`."""

    folder: Path
    config: Mapping[str, Any]
    report: Mapping[str, Any]

    def curve(self, row: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        """Timesteps of the sampler, and a row's error at each of them."""
        stored = json.loads(self._stored(row).with_suffix(".json").read_text())
        return stored["timesteps"], stored["errors"]

    def images(self, row: Mapping[str, Any]) -> Tensor:
        """Images of a row, shape `(N, C, H, W)`."""
        return load_file(self._stored(row).with_suffix(".safetensors"))["images"]

    def float_images(self) -> Tensor:
        """The float model's images from the same noise; drawn again if they were not kept."""
        evaluation = EvaluationSection(**self.config["evaluation"])
        folder, cache = Path(self.config["model"]), self.folder.parent / "float-images"
        model = load_float_model(folder)
        images = float_images(evaluation, self.config["steps"], model, folder, cache)
        return images[: evaluation.samples]

    def _stored(self, row: Mapping[str, Any]) -> Path:
        # The suffix is a dummy: `.int8` alone would be replaced.
        return self.folder / "rows" / f"{row['key']}.{row['execution']}.any"


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
                    raise ConfigError(
                        f"{run.folder.name} and {other.folder.name} both have {row['method']!r} "
                        f"with seed {run.config['seed']}. Set group_by to what differs in them."
                    )
        return tuple(Method(*key, found) for key, found in draws.items())

    @property
    def noise_floor(self) -> Mapping[str, float]:
        """Metrics of the float model against itself, from other noise."""
        floor: Mapping[str, float] = self.runs[0].report["noise_floor"]
        return floor

    def measured(self) -> list[str]:
        """The metrics that some row has."""
        return [metric for metric in METRICS if any(m.values(metric) for m in self.methods)]


def load_run(folder: Path) -> FinishedRun:
    """Read a finished run."""
    config, report = (
        json.loads((folder / name).read_text()) for name in ("config.json", "report.json")
    )
    return FinishedRun(folder, config, report)


def groups_of(part: Part, runs: Iterable[FinishedRun]) -> list[Group]:
    """Divide a part's runs by `group_by`, in the order of their appearance.

    Raises:
        ConfigError: A run has no setting of that name.
    """
    by_name: dict[str, list[FinishedRun]] = {}
    for run in runs:
        if "rows" in run.report:
            by_name.setdefault(_group_name(part, run), []).append(run)
    return [Group(name, tuple(found)) for name, found in by_name.items()]


def _group_name(part: Part, run: FinishedRun) -> str:
    value: Any = run.config
    for key in part.group_by.split(".") if part.group_by else ():
        if key not in value:
            raise ConfigError(f"group_by = {part.group_by!r} is no setting of {run.folder.name}.")
        value = value[key]
    return str(value) if part.group_by else ""
