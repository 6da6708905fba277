"""The report's table of methods: one row each, what the columns mean, the best marked."""

from collections.abc import Sequence

from tdq_plugin.study.markup import Markup, definitions, number, paragraph, section, table
from tdq_plugin.study.schema import (
    HIGHER_IS_BETTER,
    METRICS,
    Report,
    ReportRow,
    metric_of,
)

__all__ = ["COLUMNS", "EXECUTIONS", "results_section"]

COLUMNS = {
    "trajectory_mse": (
        "Trajectory error",
        "Mean squared difference between the quantized and the float model's output (the "
        "predicted noise), both fed the inputs the float model meets while it draws. Mean over "
        "the sampler's timesteps except t = 0.",
    ),
    "trajectory_mse_unseen": (
        "Trajectory error, unseen\N{NO-BREAK SPACE}t",
        "The same on timesteps that were not used in calibration.",
    ),
    "t0_mse": (
        "Error at t\N{NO-BREAK SPACE}=\N{NO-BREAK SPACE}0",
        "The same at the last step only. It is far larger than at all others and matters least "
        "for the image, so it is kept out of the mean.",
    ),
    "step_mse": (
        "Step error",
        "Mean squared difference of the partly drawn image after one sampler step from the float "
        "model's.",
    ),
    "pixel_mse": (
        "Pixel error",
        "Mean squared difference of the finished images from those the float model draws from the "
        "same noise; pixels go from -1 to 1.",
    ),
    "frechet_distance": (
        "Fréchet distance to data",
        "How far the samples as a set are from real images: the distance of two Gaussians fitted "
        "to the features of a small network. 0 would be no difference.",
    ),
    "frechet_distance_to_float": (
        "Fréchet distance to float",
        "The same distance to the float model's samples.",
    ),
    "classifier_score": (
        "Classifier score",
        "How clearly the samples show digits, and how evenly all ten: the formula of the Inception "
        "score with the digit classifier, at most 10; real digits have 7.5. Higher is better.",
    ),
}
EXECUTIONS = {
    "float32": "float32",
    "fake": "simulated",
    "int8": "int8 kernels",
}


def results_section(report: Report) -> Markup:
    """Return the section with the table of methods and its explanations."""
    rows = report["rows"]
    notes = [_comparability(rows), *report.get("notes", [])]
    floor = report.get("noise_floor", {})
    shown = [
        metric for metric in METRICS if any(metric_of(row, metric) is not None for row in rows)
    ]
    header = ["Method", "Execution", *(COLUMNS[metric][0] for metric in shown), "Samples"]
    cells = [_cells(row, shown) for row in rows]
    noise = ["Noise floor", "float32", *(number(floor.get(metric)) for metric in shown), ""]
    meanings = dict(COLUMNS[metric] for metric in shown)
    meanings["Execution"] = (
        "Simulated: the rounding is imitated in float32. Int8 kernels: integer arithmetic, as "
        "deployed."
    )
    if floor:
        meanings["Noise floor"] = (
            "The float model against itself, drawing from other noise: what the Fréchet distances "
            "are by chance alone. Samples drawn from the same noise can lie below it."
        )
    return section(
        "Results",
        paragraph(
            "Lower is better, but for the classifier score. The best quantized method is marked."
        ),
        table(header, cells, best=_best(rows, cells, shown), footer=[noise] if floor else []),
        definitions(meanings),
        *(paragraph(note, kind="note") for note in notes),
    )


def _cells(row: ReportRow, metrics: Sequence[str]) -> list[str]:
    values = [number(metric_of(row, metric)) for metric in metrics]
    return [row["method"], EXECUTIONS[row["execution"]], *values, f"{row['samples']:,}"]


def _best(
    rows: Sequence[ReportRow], cells: Sequence[Sequence[str]], metrics: Sequence[str]
) -> set[tuple[int, int]]:
    """Find the best cell of each metric; what is equal as printed is equally good."""
    quantized = [y for y, row in enumerate(rows) if row["execution"] != "float32"]
    best = set()
    for x, metric in enumerate(metrics, start=2):
        choose = max if metric in HIGHER_IS_BETTER else min
        values = {y: float(cells[y][x]) for y in quantized if cells[y][x] != number(None)}
        best |= {(y, x) for y, value in values.items() if value == choose(values.values())}
    return best


def _comparability(rows: Sequence[ReportRow]) -> str:
    spaces = ", ".join(sorted({row["feature_space"] for row in rows}))
    return (
        f"Feature space of the Fréchet distances: {spaces}. They can be compared only with "
        "distances in the same space from equally many samples. "
        "Each row is one calibration: another seed moves small differences, and the Fréchet "
        "distance reacts strongly to small common changes of the scales. Compare several seeds "
        "before you believe a close ranking."
    )
