"""The recipe `ddim-digits-ranges` on a tiny model."""

import json
import re
from pathlib import Path

import pytest
import torch

from tdq_plugin.errors import ConfigError
from tdq_plugin.grid import activation_grid
from tdq_plugin.observe import Observation
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.ddim_digits_ranges import _layer
from tdq_plugin.recipes.run_state import RunState

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


def test_dry_run_checks_model_and_folder(tiny_pipeline: Path, tmp_path: Path) -> None:
    settings = ["steps=4", f"model={tiny_pipeline}", f"output={tmp_path}"]
    plan = RANGES.plan(RANGES.configure(settings))
    assert re.search(r"quantizers +\d+ activations, W4A4\n +observed +256 trajectories of 4", plan)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="is neither the folder of a saved diffusers pipeline"):
        RANGES.plan(RANGES.configure([f"model={tmp_path}/none", f"output={tmp_path}"]))
    config = RANGES.configure(settings)
    RunState(config.run_folder, config.model_dump(mode="json"), config.changeable)
    with pytest.raises(ConfigError, match=r"calibration\.images"):
        RANGES.plan(RANGES.configure([*settings, "calibration.images=2"]))


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
