"""The recipe `ldm-digits-ptq` on a tiny latent model with random weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tdq_plugin.deploy import load_int8
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.evaluation.sampling import sample, scheduler_with
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.study.schema import METRICS, validate_report

pytestmark = pytest.mark.whole

PTQ = find_recipe("ldm-digits-ptq")
SMALL = [
    "threads=1",
    "bits=W4A8",
    "steps=2",
    "int8_methods=[lsq, tdq]",
    "fake_methods=[]",
    "correction.images=4",
    "calibration.images=4",
    "reconstruction.iterations=2",
    "reconstruction.batch_size=4",
    "evaluation.samples=100",
    "evaluation.trajectories=4",
    "latency_rounds=2",
]


@pytest.fixture(scope="module")
def finished(tiny_latent_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs")
    return PTQ.run(PTQ.configure([*SMALL, f"model={tiny_latent_pipeline}", f"output={output}"]))


def test_the_report_is_that_of_the_pixel_model(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    validate_report(report)
    assert report["recipe"] == "ldm-digits-ptq"
    assert report["command"].startswith("tdq run ldm-digits-ptq ")
    rows = {row["method"]: row for row in report["rows"]}
    assert {"float32", "static LSQ", "TDQ"} <= set(rows)
    for name in ("static LSQ", "TDQ"):
        assert all(rows[name][metric] > 0 for metric in METRICS)
    assert (finished / "report.html").stat().st_size > 10_000


def test_images_are_decoded(finished: Path, tiny_latent_pipeline: Path) -> None:
    images = load_file(finished / "rows" / "tdq.int8.safetensors")["images"]
    assert images.shape == (100, 1, 16, 16)
    assert load_float_model(tiny_latent_pipeline).latent_shape == (2, 8, 8)


def test_the_saved_model_draws_latents(finished: Path, tiny_latent_pipeline: Path) -> None:
    model = load_float_model(tiny_latent_pipeline)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    example = noise, torch.tensor([0, 500])
    integer = load_int8(finished / "model" / "int8", model.unet, example)
    images = sample(integer, scheduler_with(model.scheduler, 2), noise, decode=model.decode)
    assert images.shape == (2, 1, 16, 16)
