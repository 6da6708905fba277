"""The figures that a single run does not have, as PNG bytes."""

import math
from collections.abc import Mapping, Sequence
from statistics import geometric_mean, median

import torch
from torch import Tensor

from tdq_plugin.study.canvas import (
    INK,
    KNOWN_COLOURS,
    MUTED,
    TIMESTEP_LABEL,
    method_colours,
    plain_ticks,
    png,
    shorten,
    subplots,
)

__all__ = [
    "distance_dots",
    "error_bands",
    "histogram",
    "lines_over_steps",
    "range_bands",
    "ratios_over_timesteps",
    "scale_histories",
]


def distance_dots(
    groups: Mapping[str, Mapping[str, Sequence[float]]], floors: Mapping[str, float | None]
) -> bytes:
    """Draw every draw of every method as a dot on a log axis, one panel per group, 4 in a row.

    Args:
        groups: For each group the draws of each method.
        floors: The noise floor of each group, where it was measured.
    """
    methods = list(dict.fromkeys(name for draws in groups.values() for name in draws))
    colours = method_colours(methods)
    columns = min(len(groups), 4)
    rows = math.ceil(len(groups) / columns)
    height = 0.9 + 0.28 * len(methods)
    # A single panel is as wide as the label below it.
    width = max(5.2, 2.2 + 2.4 * columns)
    figure, panels = subplots(rows, columns, width, rows * height)
    for axes in panels[len(groups) :]:
        axes.remove()
    for index, (group, draws) in enumerate(groups.items()):
        axes = panels[index]
        for method, values in draws.items():
            row = [methods.index(method)] * len(values)
            axes.plot(list(values), row, "o", ms=6, color=colours[method], alpha=0.8)
        floor = floors[group]
        if floor is not None:
            axes.axvline(floor, color=MUTED, lw=1, ls=":")
        axes.set_title(group, loc="left", fontsize=10)
        axes.set(xscale="log", ylim=(len(methods) - 0.5, -0.5))
        plain_ticks(axes.xaxis)
        first = index % columns == 0
        axes.set_yticks(range(len(methods)), methods if first else [""] * len(methods))
        axes.tick_params(axis="y", labelcolor=INK, length=0)
    figure.supxlabel(
        "Fréchet distance to the float model's samples  (dotted: noise floor)", fontsize=10
    )
    return png(figure)


def lines_over_steps(
    curves: Mapping[str, Mapping[int, Sequence[float]]], label: str, log: bool = True
) -> bytes:
    """Draw each method's draws, and their median, over the number of sampler steps.

    Args:
        curves: For each method the draws at each number of steps.
        label: Of the vertical axis.
        log: Whether that axis is logarithmic.
    """
    colours = method_colours(curves)
    figure, (axes,) = subplots(1, 1, 7.2, 3.6)
    for method, draws in curves.items():
        steps = sorted(draws)
        middle = [median(draws[step]) for step in steps]
        colour = INK if method == "float32" else colours[method]
        axes.plot(steps, middle, "o-", ms=4, lw=1.8, color=colour, label=method)
        for step in steps:
            axes.plot([step] * len(draws[step]), list(draws[step]), ".", ms=4, color=colour)
    axes.set(xlabel="steps of the sampler", ylabel=label, xscale="log")
    if log:
        axes.set_yscale("log")
        plain_ticks(axes.yaxis)
    ticks = sorted({step for draws in curves.values() for step in draws})
    axes.set_xticks(ticks, [str(step) for step in ticks])
    axes.set_xticks([], minor=True)
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)


def range_bands(
    timesteps: Sequence[float], layers: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> bytes:
    """Draw a band between the low and the high values of each layer over t, a panel per layer."""
    columns = min(3, len(layers))
    rows = -(-len(layers) // columns)
    figure, panels = subplots(rows, columns, 3.4 * columns, 0.5 + 2.1 * rows)
    for axes, (name, (low, high)) in zip(panels, layers.items(), strict=False):
        axes.fill_between(timesteps, low, high, color=KNOWN_COLOURS["TDQ"], alpha=0.25, lw=0)
        for edge in (low, high):
            axes.plot(timesteps, edge, color=KNOWN_COLOURS["TDQ"], lw=1.4)
        axes.axhline(0, color=MUTED, lw=0.8)
        axes.set_title(shorten(name), loc="left", fontsize=9)
        axes.tick_params(labelsize=8)
    for axes in panels[len(layers) :]:
        axes.set_visible(False)
    figure.supxlabel(TIMESTEP_LABEL, fontsize=10)
    figure.supylabel("activation, 99.8 % of the values", fontsize=10)
    return png(figure)


def ratios_over_timesteps(
    ratios: Mapping[str, Sequence[Mapping[float, float]]], label: str
) -> bytes:
    """Draw each method's draws, and their geometric mean, over t; 1 is a line of its own.

    Args:
        ratios: For each method the draws, by timestep.
        label: Of the vertical axis.
    """
    colours = method_colours(ratios)
    figure, (axes,) = subplots(1, 1, 7.2, 3.4)
    axes.axhline(1, color=MUTED, lw=1, ls=":")
    for method, draws in ratios.items():
        for draw in draws:
            axes.plot(list(draw), list(draw.values()), lw=0.7, alpha=0.5, color=colours[method])
        timesteps = sorted(set.intersection(*(set(draw) for draw in draws)))
        middle = [geometric_mean(draw[t] for draw in draws) for t in timesteps]
        axes.plot(timesteps, middle, "o-", ms=3.5, lw=1.8, color=colours[method], label=method)
    axes.set(xlabel=TIMESTEP_LABEL, ylabel=label)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return png(figure)


def error_bands(timesteps: Sequence[float], errors: Mapping[str, Tensor]) -> bytes:
    """Draw the median layer's relative error over t, and the middle half of the layers.

    Args:
        timesteps: T of them.
        errors: For each kind of scale the errors `(L, T)`.
    """
    figure, (axes,) = subplots(1, 1, 7.2, 3.4)
    colours = (KNOWN_COLOURS["static LSQ"], KNOWN_COLOURS["TDQ"])
    for (name, values), colour in zip(errors.items(), colours, strict=True):
        low, middle, high = values.quantile(torch.tensor([0.25, 0.5, 0.75]), dim=0).tolist()
        axes.fill_between(timesteps, low, high, color=colour, alpha=0.18, lw=0)
        axes.plot(timesteps, middle, "o-", ms=3.5, lw=1.8, color=colour, label=name)
    axes.set(xlabel=TIMESTEP_LABEL, ylabel="rounding error / mean square")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return png(figure)


def histogram(values: Sequence[float], label: str) -> bytes:
    """Draw how many layers have a value in each tenth of [0, 1]."""
    figure, (axes,) = subplots(1, 1, 5.6, 2.8)
    edges = [tenth / 10 for tenth in range(11)]
    axes.hist(list(values), bins=edges, color=KNOWN_COLOURS["TDQ"], rwidth=0.9)
    axes.set(xlabel=label, ylabel="layers", xlim=(0, 1))
    return png(figure)


def scale_histories(
    timesteps: Sequence[float],
    histories: Mapping[int, Mapping[str, Sequence[float]]],
    names: Sequence[str],
) -> bytes:
    """Draw s(t) after several numbers of training steps, a panel per layer.

    Args:
        timesteps: T of them.
        histories: For each number of training steps the scales of each layer.
        names: The layers to draw.
    """
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure, panels = subplots(rows, columns, 3.4 * columns, 0.6 + 2.2 * rows)
    for axes, name in zip(panels, names, strict=False):
        for index, step in enumerate(sorted(histories)):
            strength = (index + 1) / len(histories)
            colour = (0.75 - 0.75 * strength, 0.82 - 0.37 * strength, 0.92 - 0.22 * strength)
            axes.plot(timesteps, histories[step][name], color=colour, lw=1.6)
        axes.set_title(shorten(name), loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.supxlabel(TIMESTEP_LABEL, fontsize=10)
    figure.supylabel("activation scale", fontsize=10)
    labels = [f"{step} training steps" for step in sorted(histories)]
    figure.legend(
        panels[0].lines, labels, loc="outside upper center", ncols=len(labels), frameon=False
    )
    return png(figure)
