"""The tables of a study: all methods of a group, and ratios of methods that shared their draws."""

import itertools
from collections.abc import Mapping, Sequence

from tdq_plugin.studies.document import Table
from tdq_plugin.studies.results import Group, Method
from tdq_plugin.studies.statistics import Summary, centre, paired_ratio
from tdq_plugin.study.markup import number
from tdq_plugin.study.results_table import COLUMNS, EXECUTIONS
from tdq_plugin.study.schema import HIGHER_IS_BETTER

__all__ = ["SHOWN", "methods_table", "ratios_table"]

SHOWN = (
    "trajectory_mse",
    "trajectory_mse_unseen",
    "t0_mse",
    "pixel_mse",
    "frechet_distance",
    "frechet_distance_to_float",
    "classifier_score",
)


def methods_table(group: Group) -> Table:
    """One row per method and execution, the best quantized one of each column marked."""
    metrics = [metric for metric in SHOWN if metric in group.measured()]
    rows = [
        [
            method.title,
            EXECUTIONS[method.execution],
            *(_cell(metric, tuple(method.values(metric).values())) for metric in metrics),
            str(len(method.draws)),
        ]
        for method in group.methods
    ]
    floor = [number(group.noise_floor.get(metric)) for metric in metrics]
    rows.append(["*noise floor*", EXECUTIONS["float32"], *floor, ""])
    header = ["Method", "Execution", *(COLUMNS[metric][0] for metric in metrics), "Draws"]
    return Table(header, rows, best=_best(group.methods, metrics))


def ratios_table(group: Group, pairs: Sequence[tuple[str, str]]) -> Table | None:
    """Every pair by every metric; None if the group has no pair."""
    rows = []
    for pair in pairs:
        for first, second in _compared(*(_of_title(group, title) for title in pair)):
            rows += _ratio_rows(_ratio_title(first, second), first, second)
    if not rows:
        return None
    header = ["Ratio", "Metric", "Ratio of centres", "Each draw", "95 % interval"]
    return Table(header, rows)


def _compared(
    firsts: Mapping[str, Method], seconds: Mapping[str, Method]
) -> list[tuple[Method, Method]]:
    """Rows of the same execution; where there are none, all, as some methods have only one."""
    alike = [(firsts[name], seconds[name]) for name in firsts if name in seconds]
    return alike or list(itertools.product(firsts.values(), seconds.values()))


def _ratio_title(first: Method, second: Method) -> str:
    executions = [EXECUTIONS[method.execution] for method in (first, second)]
    if executions[0] == executions[1]:
        return f"{first.title} / {second.title}, {executions[0]}"
    return f"{first.title}, {executions[0]} / {second.title}, {executions[1]}"


def _ratio_rows(title: str, first: Method, second: Method) -> list[list[str]]:
    rows = []
    for metric in SHOWN:
        ratio = paired_ratio(metric, first.values(metric), second.values(metric))
        if ratio is not None:
            draws = ", ".join(f"{draw:.2f}" for draw in ratio.draws)
            interval = "–"
            if ratio.interval is not None:
                interval = f"{ratio.interval[0]:.2f} to {ratio.interval[1]:.2f}"
            rows.append([title, COLUMNS[metric][0], f"{ratio.centre:.2f}", draws, interval])
    return rows


def _of_title(group: Group, title: str) -> dict[str, Method]:
    return {method.execution: method for method in group.methods if method.title == title}


def _cell(metric: str, values: tuple[float, ...]) -> str:
    if not values:
        return number(None)
    draws = Summary(values)
    middle = number(centre(metric, values))
    if draws.low == draws.high:
        return middle
    return f"{middle} [{number(draws.low)}, {number(draws.high)}]"


def _best(methods: Sequence[Method], metrics: Sequence[str]) -> frozenset[tuple[int, int]]:
    best = set()
    for x, metric in enumerate(metrics, start=2):
        centres = {
            y: centre(metric, tuple(values.values()))
            for y, method in enumerate(methods)
            if method.execution != "float32" and (values := method.values(metric))
        }
        if centres:
            choose = max if metric in HIGHER_IS_BETTER else min
            best |= {(y, x) for y, value in centres.items() if value == choose(centres.values())}
    return frozenset(best)
