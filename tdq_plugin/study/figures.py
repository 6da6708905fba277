"""The figures of a report, as PNG bytes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.study.canvas import (
    INK,
    KNOWN_COLOURS,
    MUTED,
    TIMESTEP_LABEL,
    method_colours,
    png,
    shorten,
    subplots,
)

__all__ = ["error_over_timesteps", "loss_curve", "sample_grid", "scale_curves"]


def sample_grid(samples: Mapping[str, Tensor], columns: int = 12) -> bytes:
    """Draw one row of images per method; a column is one initial noise.

    Args:
        samples: Images `(N, C, H, W)` in [-1, 1] of each method, C = 1 or 3, drawn from the same
            noise in the same order.
        columns: Number of images shown of each method.

    Raises:
        ConfigError: There is no method, the methods' images differ in size, or there are too few.
    """
    rows = [_row_of_images(name, images, columns) for name, images in samples.items()]
    if len({row.shape for row in rows}) != 1:
        sizes = {name: tuple(images.shape[1:]) for name, images in samples.items()}
        raise ConfigError(f"A sample grid needs images of one size, got {sizes}.")
    picture = torch.cat(rows).repeat_interleave(4, 0).repeat_interleave(4, 1)
    height, width = picture.shape[0] / len(rows), picture.shape[1] / columns
    labels = 0.2 + 0.085 * max(map(len, samples))
    figure, (axes,) = subplots(1, 1, labels + 0.62 * columns, 0.35 + 0.62 * len(rows))
    axes.imshow(picture.numpy(), interpolation="nearest", aspect="equal")
    # What the images leave free is for the labels.
    axes.set_anchor("E")
    axes.set_yticks([(row + 0.5) * height for row in range(len(rows))], list(samples))
    numbers = [str(column + 1) for column in range(columns)]
    axes.set_xticks([(column + 0.5) * width for column in range(columns)], numbers)
    axes.tick_params(length=0, labelsize=10, labelcolor=INK)
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", labelcolor=MUTED, labelsize=8)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return png(figure)


def _row_of_images(name: str, images: Tensor, columns: int) -> Tensor:
    """Return `(H + 2, columns * (W + 2), 3)` in [0, 1]: images in a row with white borders."""
    if images.dim() != 4 or images.shape[1] not in (1, 3) or len(images) < columns:
        raise ConfigError(
            f"{name}: {tuple(images.shape)} are not {columns} images (N, 1 or 3, H, W)."
        )
    shown = (images[:columns].detach().float().clamp(-1, 1) + 1) / 2
    framed = torch.nn.functional.pad(shown.expand(-1, 3, -1, -1), [1] * 4, value=1.0)
    return torch.cat(list(framed), dim=2).permute(1, 2, 0)


def scale_curves(
    timesteps: Tensor,
    scales: Tensor,
    observed_timesteps: Tensor,
    observed_scales: Tensor,
    static_scales: Tensor,
    names: Sequence[str],
    layers: int = 6,
) -> bytes:
    """Draw learned scales s(t) against observed and static ones, for the layers that move most.

    Args:
        timesteps: Timesteps of the table, `(T,)`.
        scales: Learned scales, `(T, L)`.
        observed_timesteps: Timesteps of the calibration, `(T',)`.
        observed_scales: Scales that follow from the ranges seen at each of them, `(T', L)`.
        static_scales: The static quantizer's scales, `(L,)`.
        names: Names of the L layers.
        layers: Number of layers shown, those with the largest max / min of `observed_scales`.
    """
    movement = observed_scales.amax(dim=0) / observed_scales.amin(dim=0)
    shown = movement.argsort(descending=True)[:layers].tolist()
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, panels = subplots(rows, columns, 3.4 * columns, 0.6 + 2.3 * rows)
    order = timesteps.argsort()
    for axes, layer in zip(panels, shown, strict=False):
        observed = observed_scales[:, layer].tolist()
        axes.plot(observed_timesteps.tolist(), observed, "o", ms=4.5, mfc="white", mec=MUTED)
        axes.axhline(
            static_scales[layer].item(), color=KNOWN_COLOURS["static LSQ"], lw=1.4, ls="--"
        )
        learned = scales[order, layer].tolist()
        axes.plot(timesteps[order].tolist(), learned, color=KNOWN_COLOURS["TDQ"], lw=2)
        axes.set_title(f"{shorten(names[layer])}   ×{movement[layer]:.2f}", loc="left", fontsize=9)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
    for axes in panels[len(shown) :]:
        axes.set_visible(False)
    figure.supxlabel(TIMESTEP_LABEL, fontsize=10, color=INK)
    figure.supylabel("activation scale", fontsize=10, color=INK)
    labels = ["from observed range", "static", "learned s(t)"]
    figure.legend(panels[0].lines, labels, loc="outside upper center", ncols=3, frameon=False)
    return png(figure)


def loss_curve(losses: Sequence[float], smoothing: int = 100) -> bytes:
    """Draw a training loss over the iterations, raw and as a moving average.

    Args:
        losses: One positive value per iteration.
        smoothing: Width of the centred moving average in iterations.
    """
    figure, (axes,) = subplots(1, 1, 7.2, 3.4)
    axes.plot(range(1, len(losses) + 1), losses, color="#c3d9e8", lw=0.6, label="each iteration")
    width = min(smoothing, len(losses))
    smooth = torch.tensor(losses, dtype=torch.float64).unfold(0, width, 1).mean(dim=1)
    label = f"mean of {width}"
    centres = range(1 + width // 2, 1 + width // 2 + len(smooth))
    axes.plot(centres, smooth.tolist(), color=KNOWN_COLOURS["TDQ"], lw=1.8, label=label)
    axes.set(xlabel="iteration", ylabel="loss (log scale)", yscale="log", xlim=(0, len(losses)))
    axes.legend(frameon=False)
    return png(figure)


def error_over_timesteps(errors: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """Draw each method's error against the float model over the timesteps, on a log axis.

    Args:
        errors: For each method its timesteps and the mean squared error at each of them.
    """
    colours = method_colours(errors)
    figure, (axes,) = subplots(1, 1, 8.4, 3.8)
    for method, (timesteps, error) in errors.items():
        pairs = sorted(zip(timesteps, error, strict=True))
        emphasis: dict[str, Any] = {"lw": 2.4, "zorder": 3} if method == "TDQ" else {"lw": 1.5}
        x, y = zip(*pairs, strict=True)
        axes.plot(x, y, "o-", ms=3.5, color=colours[method], label=method, **emphasis)
    axes.set(xlabel=TIMESTEP_LABEL, ylabel="mean squared error (log scale)", yscale="log")
    figure.legend(loc="outside right upper", frameon=False)
    return png(figure)
