"""The PTQ recipe through PT2E: the same report, and a program for backends."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.evaluation.sampling import image_shape, scheduler_with
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.ptq.method_states import MethodStates
from tdq_plugin.recipes.ptq.methods import METHODS
from tdq_plugin.recipes.run_state import RunState
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.study.schema import METRICS, validate_report

pytestmark = pytest.mark.whole

SMALL = [
    "adapter=pt2e",
    "threads=1",
    "bits=W4A8",
    "steps=2",
    "int8_methods=[lsq, tdq]",
    "fake_methods=[dynamic]",
    "calibration.images=4",
    "reconstruction.iterations=2",
    "reconstruction.batch_size=4",
    "evaluation.samples=100",
    "evaluation.trajectories=4",
    "correction.methods=[]",
    "latency_rounds=2",
]
PTQ = find_recipe("ddim-digits-ptq")


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return PTQ.run(PTQ.configure(overrides))


def test_the_report_is_that_of_the_recipe(report: dict[str, Any]) -> None:
    validate_report(report)
    rows = {(row["method"], row["execution"]) for row in report["rows"]}
    expected = {(METHODS[name].title, "fake") for name in ("lsq", "tdq", "dynamic")}
    assert rows == expected | {("float32", "float32")}
    assert all(row[metric] > 0 for row in report["rows"][1:] for metric in METRICS)
    assert "adapter=pt2e" in report["command"]
    assert "before a backend compiles them" in report["latency"]["unit"]


@torch.no_grad()
def test_the_saved_program_serves_every_timestep(finished: Path, unet: UNet2DModel) -> None:
    points = CalibrationSet(torch.randn(2, *image_shape(unet)), torch.tensor([0, 500]))
    model = load_framework("pt2e").prepare(unet, points, Bits(4, 8))
    state = RunState(finished, json.loads((finished / "config.json").read_text()))
    model = MethodStates(state, model).load("tdq")
    program = torch.export.load(finished / "model" / "int8" / "model.pt2").module()
    scheduler = DDIMScheduler.from_pretrained(finished / "model" / "scheduler")
    x = torch.randn(3, *image_shape(unet))
    for timestep in scheduler_with(scheduler, 2).timesteps.float():
        expected = model(x, timestep)
        # Where float rounding moves one activation to the next code, others follow.
        difference = program(x, timestep.reshape(1)) - expected
        assert difference.norm() < 0.05 * expected.norm()


def test_weights_are_rounded_to_nearest(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"learn_rounding = true: pt2e rounds weights"):
        PTQ.run(PTQ.configure([*overrides, "reconstruction.learn_rounding=true"]))
