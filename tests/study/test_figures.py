"""Figures are PNGs that show what they were given."""

import io
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.study.canvas import method_colours, plain_ticks, subplots
from tdq_plugin.study.figures import (
    error_over_timesteps,
    loss_curve,
    sample_grid,
    scale_curves,
)

BLUE = np.array([0x00, 0x72, 0xB2]) / 255


def decode(png: bytes) -> np.ndarray:
    assert png.startswith(b"\x89PNG")
    return matplotlib.image.imread(io.BytesIO(png))[..., :3]


def blue_pixels(png: bytes) -> int:
    return int((np.abs(decode(png) - BLUE).max(axis=-1) < 0.02).sum())


def images(count: int, channels: int = 1, value: float = -1.0) -> Tensor:
    return torch.full((count, channels, 16, 16), value)


def test_sample_grid_has_a_row_per_method_and_a_tile_per_column() -> None:
    few = decode(sample_grid({"float": images(8), "TDQ": images(8)}, columns=8))
    more = decode(sample_grid({"float": images(8), "LSQ": images(8), "TDQ": images(8)}, columns=8))
    black = [(picture.max(axis=-1) < 0.01).sum() for picture in (few, more)]
    assert black[1] / black[0] == pytest.approx(1.5, rel=0.1)
    assert few.mean() > 0.3


def test_sample_grid_in_colour() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).reshape(1, 3, 1, 1).expand(4, 3, 16, 16)
    picture = decode(sample_grid({"float": red}, columns=4))
    assert (np.abs(picture - [1, 0, 0]).max(axis=-1) < 0.01).sum() > 1000


@pytest.mark.parametrize(
    ("rows", "name"), [(11, "table, 100 groups"), (3, "TDQ, zero point of t, corrected")]
)
def test_labels_of_a_sample_grid_are_whole(rows: int, name: str) -> None:
    names = [name, *(f"row {row}" for row in range(1, rows))]
    picture = decode(sample_grid({name: images(16) for name in names}, columns=16))
    assert picture[:, 0].min() == 1


def test_sample_grid_refuses_what_it_cannot_place() -> None:
    with pytest.raises(ConfigError, match=r"TDQ: \(3, 1, 16, 16\) are not 8 images"):
        sample_grid({"TDQ": images(3)}, columns=8)
    with pytest.raises(ConfigError, match="images of one size"):
        sample_grid({"a": images(2), "b": torch.zeros(2, 1, 8, 8)}, columns=2)
    with pytest.raises(ConfigError, match="images of one size"):
        sample_grid({}, columns=2)


def scale_curves_of(layers: int, shown: int) -> bytes:
    timesteps, observed = torch.arange(0, 1000, 10), torch.arange(0, 1000, 50)
    slopes = torch.arange(1.0, layers + 1)
    return scale_curves(
        timesteps.flip(0),
        0.1 + timesteps.flip(0)[:, None] / 1000 * slopes,
        observed,
        0.1 + observed[:, None] / 1000 * slopes,
        torch.full((layers,), 0.3),
        [f"down_blocks.{index}" for index in range(layers)],
        layers=shown,
    )


def test_scale_curves_draw_a_panel_per_layer() -> None:
    assert blue_pixels(scale_curves_of(10, 6)) > 4 * blue_pixels(scale_curves_of(10, 1)) > 400
    assert len(scale_curves_of(2, 6)) > 0


def test_loss_curve_of_fewer_iterations_than_its_smoothing() -> None:
    assert blue_pixels(loss_curve([1.0, 0.5, 0.3], smoothing=100)) > 0
    assert blue_pixels(loss_curve([1 / (1 + i) for i in range(500)], smoothing=20)) > 500


def test_error_over_timesteps_accepts_any_order() -> None:
    forward = {"TDQ": ([0, 500, 900], [1e-2, 1e-3, 1e-4]), "mine": ([0, 900], [1e-2, 1e-2])}
    backward = {"TDQ": ([900, 500, 0], [1e-4, 1e-3, 1e-2]), "mine": ([900, 0], [1e-2, 1e-2])}
    assert np.array_equal(
        decode(error_over_timesteps(forward)), decode(error_over_timesteps(backward))
    )


@pytest.mark.parametrize(
    ("low", "high"), [(0.1023, 0.338), (0.21, 0.39), (0.05, 2.5), (0.18, 0.6), (3.0, 4.0)]
)
def test_a_logarithmic_axis_has_a_few_plain_ticks(low: float, high: float) -> None:
    _, (axes,) = subplots(1, 1, 3, 2)
    axes.set(xscale="log", xlim=(low, high))
    plain_ticks(axes.xaxis)
    shown = [tick for tick in axes.xaxis.get_majorticklocs() if low <= tick <= high]
    assert 2 <= len(shown) <= 6


def test_methods_keep_their_colours_and_do_not_share_them() -> None:
    colours = method_colours(["mine", "TDQ", "yours", "static LSQ"])
    assert len(set(colours.values())) == 4
    assert method_colours(["static LSQ"])["static LSQ"] == colours["static LSQ"]


def test_import_is_light_and_drawing_leaves_no_global_backend() -> None:
    code = (
        "import sys, tdq_plugin.study, tdq_plugin.study.figures as figures\n"
        "heavy = {'matplotlib', 'torchmetrics', 'diffusers', 'scipy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "figures.loss_curve([1.0, 0.5])\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
