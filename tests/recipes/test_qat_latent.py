"""The recipes `ldm-digits-qat` and `ldm-churches-qat`, tiny from end to end."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tdq_plugin.deploy.package import read_description
from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.ldm_digits_qat import MODEL
from tdq_plugin.study.schema import METRICS, validate_report

pytestmark = pytest.mark.whole

DIGITS = find_recipe("ldm-digits-qat")
CHURCHES = find_recipe("ldm-churches-qat")
SMALL = [
    "threads=1",
    "methods=[tdq]",
    "steps=2",
    "calibration.images=4",
    "training.iterations=2",
    "training.batch_size=4",
    "training.log_every=1",
    "evaluation.samples=100",
    "evaluation.trajectories=2",
]
SMALL_CHURCHES = [
    "threads=1",
    "attention_heads=4",
    "data={source: digits, validation_images: 16, flip: true}",
    "calibration={batches: 1, batch_size: 8}",
    "training.iterations=2",
    "training.batch_size=4",
    "validation={every: 1, batches: 1, keep: 1}",
    "evaluation={samples: 100, steps: 2, batch_size: 50, features: digits, with_score: false,"
    " seed: 1}",
]


@pytest.fixture(scope="module")
def report(tiny_latent_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    output = tmp_path_factory.mktemp("runs")
    overrides = [*SMALL, f"model={tiny_latent_pipeline}", f"output={output}"]
    folder = DIGITS.run(DIGITS.configure(overrides))
    return {"folder": folder, **json.loads((folder / "report.json").read_text())}


def test_the_report_is_about_decoded_images(report: dict[str, Any]) -> None:
    folder = report.pop("folder")
    validate_report(report)
    assert report["recipe"] == "ldm-digits-qat"
    assert any("decoded by the autoencoder" in note for note in report["notes"])
    _, row = report["rows"]
    assert all(row[metric] > 0 for metric in METRICS)
    images = load_file(folder / "rows" / "tdq.int8.safetensors")["images"]
    assert images.shape == (100, 1, 16, 16)
    assert images.abs().max() <= 1


def test_the_model_that_comes_with_the_package() -> None:
    model = load_float_model(MODEL)
    assert (model.latent_shape, model.image_shape) == ((3, 8, 8), (1, 32, 32))
    assert model.unet.config.resnet_time_scale_shift == "scale_shift"
    assert not model.scheduler.config.clip_sample
    assert sum(file.stat().st_size for file in MODEL.rglob("*") if file.is_file()) < 8e6


def test_churches_end_to_end(tiny_latent_pipeline: Path, tmp_path: Path) -> None:
    overrides = [*SMALL_CHURCHES, f"model={tiny_latent_pipeline}", f"output={tmp_path}"]
    folder = CHURCHES.run(CHURCHES.configure(overrides))
    found = json.loads((folder / "results.json").read_text())
    assert (found["recipe"], found["method"], found["bits"]) == ("ldm-churches-qat", "TDQ", "W4A4")
    for row in found["rows"]:
        assert row["frechet_distance"] > 0
        assert "inception_score" not in row
    assert len(found["rows"]) == 2
    assert read_description(folder / "model" / "int8")["extra"]["attention_heads"] == 4


def test_churches_plan(tiny_latent_pipeline: Path) -> None:
    config = CHURCHES.configure(
        [*SMALL_CHURCHES[:3], f"model={tiny_latent_pipeline}", "name=x-{method}"]
    )
    plan = str(CHURCHES.plan(config))
    assert re.search(r"model +.*parameters, [\d,]+ in the float autoencoder, images 1x16x16", plan)
    assert re.search(r"steps +200,000 in batches of 32, objective noise", plan)
    assert re.search(r"evaluation +50,000 images by 200 DDIM steps", plan)
    assert plan.endswith("runs/x-tdq")


def test_the_configuration_is_that_of_the_paper() -> None:
    config = CHURCHES.configure()
    training, evaluation = config.training, config.evaluation
    assert (training.iterations, training.batch_size) == (200_000, 32)
    assert training.learning_rate == config.scale_learning_rate == 5e-5
    assert config.absolute_error
    assert (evaluation.samples, evaluation.steps) == (50_000, 200)
    assert (evaluation.features, evaluation.with_score) == ("inception", False)
    assert config.validation.keep == 5


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attention_heads=0", r"^attention_heads = 0: Input should be greater than 0"),
        ("method=tdk", r"^method = 'tdk': .*choose from .*'tdq_paper'"),
        (
            "autoencoder=x",
            r"^Unknown key 'autoencoder'. Known keys: absolute_error, adapter, attention_hea",
        ),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CHURCHES.configure([override])


def test_a_pipeline_that_is_not_there() -> None:
    with pytest.raises(
        ConfigError, match=r"model = 'runs/ldm-lsun-churches' is neither the folder of"
    ):
        CHURCHES.plan(CHURCHES.configure())
