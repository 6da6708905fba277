"""The recipe `ddim-digits-ranges` on a tiny model."""

import json
from pathlib import Path

import pytest
import torch

from tdq_plugin.grid import activation_grid
from tdq_plugin.observe import Observation
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.ddim_digits_ranges import _layer

RANGES = find_recipe("ddim-digits-ranges")


def test_every_layer_is_measured_at_every_timestep(
    tiny_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["steps=4", "calibration.images=2", f"model={tiny_pipeline}", f"output={tmp_path}"]
    folder = RANGES.run(RANGES.configure(settings))
    assert folder == tmp_path / "ddim-digits-ranges-W4A4-4steps-seed0"
    report = json.loads((folder / "report.json").read_text())
    assert report["timesteps"] == [0, 250, 500, 750]
    assert report["command"].startswith("tdq run ddim-digits-ranges steps=4 calibration.images=2")
    assert len(report["layers"]) == report["temporal_dynamics"]["layers"]
    assert len(report["temporal_dynamics"]["correlation"]) == len(report["layers"])
    for layer in report["layers"].values():
        assert all(len(values) == 4 for values in layer.values())
        assert all(
            0 <= best <= static
            for best, static in zip(layer["timestep_error"], layer["static_error"], strict=True)
        )
    assert "over 0.5 in" in capsys.readouterr().out


def test_one_scale_for_all_costs_most_where_values_are_small() -> None:
    values = torch.randn(2, 512, generator=torch.Generator().manual_seed(0))
    values[1] *= 10
    limits = torch.stack(values.aminmax(dim=1), dim=1)
    seen = Observation(torch.tensor([0.0, 500.0]), limits, values.std(dim=1), values)
    layer = _layer(seen, activation_grid(4))
    small, large = (
        static / best
        for static, best in zip(layer["static_error"], layer["timestep_error"], strict=True)
    )
    assert small > 10
    assert large < 1.5
