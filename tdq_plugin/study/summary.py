"""The report in a few numbers."""

from tdq_plugin.study.markup import Markup, number, tag
from tdq_plugin.study.schema import Report, metric_of

__all__ = ["summary"]


def summary(report: Report) -> Markup:
    """Return the best methods, the price in time, and the saving in size, as tiles."""
    latency, size = report["latency"], report["size_bytes"]
    tiles = [
        _best_method(report, "trajectory_mse", "Smallest trajectory error"),
        _best_method(report, "frechet_distance", "Smallest Fréchet distance to data"),
    ]
    if latency["tdq_int8"] is not None and latency["static_int8"]:
        ratio = number(latency["tdq_int8"] / latency["static_int8"])
        tiles.append(_tile("Time of TDQ int8", f"{ratio}×", "that of static int8"))
    if size["int8"] is not None:
        ratio = number(size["float32"] / size["int8"])
        tiles.append(_tile("Saved model", f"{ratio}×", "smaller than float32"))
    return tag("div", *tiles, kind="tiles")


def _best_method(report: Report, metric: str, label: str) -> Markup:
    values = {
        row["method"]: value
        for row in reversed(report["rows"])
        if row["execution"] != "float32" and (value := metric_of(row, metric)) is not None
    }
    if not values:
        return Markup()
    best = min(values, key=lambda method: values[method])
    return _tile(label, number(values[best]), best)


def _tile(label: str, value: str, detail: str) -> Markup:
    return tag("div", tag("p", label), tag("strong", value), tag("p", detail), kind="tile")
