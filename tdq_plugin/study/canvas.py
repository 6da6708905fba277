"""What all figures share: colours, style, and a canvas that becomes a PNG.

Figures are drawn without pyplot, so no backend is chosen and nothing global is left behind.
"""

import io
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

__all__ = [
    "INK",
    "KNOWN_COLOURS",
    "MUTED",
    "TIMESTEP_LABEL",
    "method_colours",
    "plain_ticks",
    "png",
    "shorten",
    "subplots",
]

# Okabe and Ito's palette: distinguishable with the common colour vision deficiencies.
KNOWN_COLOURS = {
    "TDQ": "#0072b2",
    "TDQ, corrected": "#003f6b",
    "static LSQ": "#d55e00",
    "static LSQ, corrected": "#ff9e4a",
    "MinMax": "#8c564b",
    "learned table": "#009e73",
    "dynamic": "#cc79a7",
    "static MSE": "#e69f00",
    "per-timestep MinMax": "#56b4e9",
}
SPARE_COLOURS = ("#6a3d9a", "#117733", "#882255", "#ddaa33", "#332288")
INK, MUTED, GRID = "#1f2933", "#5b6470", "#e3e7ec"
STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#b8c0ca",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
TIMESTEP_LABEL = "timestep t  (0: image, high: noise)"


def method_colours(methods: Iterable[str]) -> dict[str, str]:
    """Give every method a colour of its own, the same one in every figure if it is well known.

    Example:
        >>> method_colours(["TDQ", "mine"])
        {'TDQ': '#0072b2', 'mine': '#6a3d9a'}
    """
    spare = iter(SPARE_COLOURS * 4)
    return {method: KNOWN_COLOURS.get(method) or next(spare) for method in methods}


def plain_ticks(axis: "Axis") -> None:
    """Ticks of a drawn logarithmic axis at 1, 2 and 5, or a few, written as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)))
    marks = [mark * 10**decade for decade in decades for mark in (1, 2, 5)]
    # With less than two of them on the axis, LogLocator would crowd it.
    enough = sum(low <= mark <= high for mark in marks) >= 2
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if enough else MaxNLocator(3))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def subplots(rows: int, columns: int, width: float, height: float) -> tuple["Figure", list["Axes"]]:
    """Return a figure of a size in inches and its panels, row by row."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def png(figure: "Figure") -> bytes:
    """Return the figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def shorten(name: str, length: int = 30) -> str:
    """Cut a layer's name from the left.

    Example:
        >>> shorten("up_blocks.2.resnets.1.conv1", 12)
        '…ets.1.conv1'
    """
    return name if len(name) <= length else "…" + name[-length + 1 :].lstrip("._")
