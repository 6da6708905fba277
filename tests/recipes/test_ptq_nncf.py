"""The PTQ recipe through NNCF: the same report, on OpenVINO's integer kernels."""

import logging
import logging.handlers
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from tdq_plugin.deploy.openvino import OVDenoiser
from tdq_plugin.errors import ConfigError, LookupRuleError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.bits import Bits
from tdq_plugin.recipes.evaluation.sampling import image_shape, sample, scheduler_with
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.ptq.methods import METHODS
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.study.schema import METRICS, validate_report

pytestmark = pytest.mark.whole

SMALL = [
    "adapter=nncf",
    "threads=1",
    "bits=W4A8",
    "steps=2",
    "int8_methods=[lsq, tdq]",
    "fake_methods=[lsq, tdq]",
    "calibration.images=4",
    "reconstruction.iterations=2",
    "reconstruction.batch_size=4",
    "evaluation.samples=100",
    "evaluation.trajectories=16",
    "correction.methods=[]",
    "latency_rounds=2",
]
PTQ = find_recipe("ddim-digits-ptq")


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return PTQ.run(PTQ.configure(overrides))


def row(report: dict[str, Any], method: str, execution: str) -> dict[str, Any]:
    wanted = METHODS[method].title, execution
    return next(row for row in report["rows"] if (row["method"], row["execution"]) == wanted)


def test_the_report_is_that_of_the_recipe(report: dict[str, Any], finished: Path) -> None:
    validate_report(report)
    rows = {(row["method"], row["execution"]) for row in report["rows"]}
    titles = [METHODS[name].title for name in ("lsq", "tdq")]
    expected = {(title, execution) for title in titles for execution in ("int8", "fake")}
    assert rows == expected | {("float32", "float32")}
    for measured in report["rows"][1:]:
        assert all(measured[metric] > 0 for metric in METRICS)
    assert "adapter=nncf" in report["command"]
    assert (finished / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["lsq", "tdq"])
def test_openvino_and_fake_quantization_agree(report: dict[str, Any], name: str) -> None:
    int8, fake = (row(report, name, execution) for execution in ("int8", "fake"))
    # Not equal: where float rounding moves one activation to the next code, others follow.
    for metric in ("trajectory_mse", "trajectory_mse_unseen"):
        assert int8[metric] == pytest.approx(fake[metric], rel=0.03)


def test_latency_is_that_of_openvino(report: dict[str, Any]) -> None:
    latency = report["latency"]
    assert latency["static_int8"] == 1.0
    assert min(latency[name] for name in ("float32", "tdq_int8")) > 0
    assert latency["dynamic_int8"] is None
    assert "OpenVINO" in latency["unit"]
    assert "precision hint f32" in latency["unit"]


def test_the_saved_model_samples(report: dict[str, Any], finished: Path) -> None:
    folder = finished / "model"
    saved = [file.stat().st_size for file in folder.rglob("*") if file.is_file()]
    assert report["size_bytes"]["int8"] == sum(saved)
    denoiser = OVDenoiser.load(folder / "int8")
    x = torch.randn(2, *image_shape(denoiser), generator=torch.Generator().manual_seed(0))
    scheduler = scheduler_with(DDIMScheduler.from_pretrained(folder / "scheduler"), 2)
    assert sample(lambda x, t: denoiser(x, t).sample, scheduler, x).isfinite().all()
    assert denoiser.model.report.lost_layers == []
    with pytest.raises(LookupRuleError, match="Timestep 250 is not in the frozen table"):
        denoiser(x, 250)


def test_the_float_model_in_openvino(unet: UNet2DModel) -> None:
    x = torch.randn(2, *image_shape(unet), generator=torch.Generator().manual_seed(0))
    run = load_framework("nncf").deploy_float(unet, CalibrationSet(x, torch.zeros(2)))
    with torch.no_grad():
        torch.testing.assert_close(run(x, 500), unet(x, 500).sample, rtol=1e-4, atol=1e-5)


def test_nncf_does_not_name_what_stays_float(unet: UNet2DModel) -> None:
    logger, records = logging.getLogger("nncf"), logging.handlers.BufferingHandler(100)
    level = logger.level
    logger.addHandler(records)
    logger.setLevel(logging.INFO)
    try:
        data = CalibrationSet(torch.zeros(2, *image_shape(unet)), torch.tensor([0.0, 500.0]))
        load_framework("nncf").prepare(unet, data, Bits(8, 8))
        messages = [record.getMessage() for record in records.buffer]
        assert not [message for message in messages if "Not adding activation" in message]
        assert logger.level == logging.INFO
    finally:
        logger.setLevel(level)
        logger.removeHandler(records)


def test_nncf_rounds_weights_itself(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"learn_rounding = true: nncf rounds weights itself"):
        PTQ.run(PTQ.configure([*overrides, "reconstruction.learn_rounding=true"]))


def test_zero_points_that_move_are_refused(overrides: list[str]) -> None:
    methods = "int8_methods=[lsq, tdq, tdq_zero_point]"
    config = PTQ.configure([*overrides, methods, "name=moving"])
    for step in (PTQ.plan, PTQ.run):
        with pytest.raises(
            ConfigError, match=r"'nncf' deploys constant zero points.*zero_point'\]"
        ):
            step(config)
