"""All numbers of a study, unrounded, for programs."""

from collections.abc import Sequence
from typing import Any

from tdq_plugin.studies.definition import Part
from tdq_plugin.studies.results import Group, Method
from tdq_plugin.studies.statistics import Summary
from tdq_plugin.study.schema import METRICS

__all__ = ["part_numbers"]


def part_numbers(part: Part, groups: Sequence[Group]) -> dict[str, Any]:
    """By group: the noise floor, and for each method every metric's draws and their summary."""
    return {
        "title": part.title,
        "groups": {
            group.name: {
                "noise_floor": dict(group.noise_floor),
                "rows": [_row(method) for method in group.methods],
            }
            for group in groups
        },
    }


def _row(method: Method) -> dict[str, Any]:
    metrics = {metric: _summary(values) for metric in METRICS if (values := method.values(metric))}
    return {"method": method.title, "execution": method.execution, "metrics": metrics}


def _summary(values: dict[int, float]) -> dict[str, Any]:
    draws = Summary(tuple(values.values()))
    return {
        "draws": {str(seed): value for seed, value in values.items()},
        "mean": draws.mean,
        "median": draws.median,
        "smallest": draws.low,
        "largest": draws.high,
        "interval_95_of_mean": draws.interval,
    }
