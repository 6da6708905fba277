"""The QAT recipes through the frameworks besides torch.ao, of which other tests tell."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import tdq_plugin as tdq
from tdq_plugin.cli import app
from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.qat.comparison import begin
from tdq_plugin.recipes.qat.model import load_weights
from tdq_plugin.study.schema import METRICS, validate_report

pytestmark = pytest.mark.whole

QAT = find_recipe("ddim-digits-qat")
FULL_SIZE = find_recipe("ddim-cifar10-qat")
SAVED = {"pt2e": "model.pt2", "brevitas": "model.onnx", "nncf": "openvino_model.xml"}
SMALL = [
    "threads=1",
    "bits=W8A4",
    "steps=2",
    "methods=[lsq, tdq]",
    "correction.methods=[tdq]",
    "correction.images=100",
    "calibration.images=4",
    "training.iterations=12",
    "training.batch_size=4",
    "training.checkpoint_every=6",
    "training.log_every=1",
    "evaluation.samples=100",
    "evaluation.trajectories=4",
]


@pytest.fixture(scope="module", params=SAVED)
def overrides(
    request: pytest.FixtureRequest, tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[str]:
    folder = tmp_path_factory.mktemp(request.param)
    return [*SMALL, f"adapter={request.param}", f"model={tiny_pipeline}", f"output={folder}"]


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return QAT.run(QAT.configure(overrides))


def adapter_of(report: dict[str, Any]) -> str:
    return next(name for name in SAVED if f"adapter={name}" in report["command"])


def test_the_report_has_a_row_for_every_method(report: dict[str, Any]) -> None:
    validate_report(report)
    assert [row["method"] for row in report["rows"]] == [
        "float32", "static LSQ", "TDQ", "TDQ, corrected"
    ]  # fmt: skip
    on_kernels = adapter_of(report) == "nncf"
    for row in report["rows"][1:]:
        assert row["execution"] == ("int8" if on_kernels else "fake")
        assert all(row[metric] is None or row[metric] > 0 for metric in METRICS)
    assert any("fake quantization" in note for note in report["notes"]) != on_kernels


def test_the_saved_model_is_the_frameworks(report: dict[str, Any], finished: Path) -> None:
    assert adapter_of(report) in finished.name
    assert (finished / "model" / "int8" / SAVED[adapter_of(report)]).is_file()
    assert (finished / "model" / "output_correction.safetensors").is_file()
    saved = [file.stat().st_size for file in (finished / "model").rglob("*") if file.is_file()]
    assert report["size_bytes"]["int8"] == sum(saved)


def test_training_lowers_the_loss_and_moves_weights_and_scales(
    finished: Path, tiny_pipeline: Path
) -> None:
    weights = load_file(finished / "weights" / "tdq.safetensors")
    original = load_float_model(tiny_pipeline).unet.state_dict()
    # Exported graphs and NNCF's hooks keep the names of the modules.
    shared = [name for name in weights if name in original and name.endswith("conv1.weight")]
    assert shared
    assert all(not torch.equal(weights[name], original[name]) for name in shared)
    records = [
        json.loads(line) for line in (finished / "logs" / "tdq.jsonl").read_text().splitlines()
    ]
    losses = [record["loss"] for record in records]
    assert len(losses) == 12
    assert sum(losses[-4:]) < sum(losses[:4])


@torch.no_grad()
def test_weights_load_into_a_model_that_is_prepared_anew(
    finished: Path, overrides: list[str]
) -> None:
    comparison = begin(QAT.configure(overrides))
    table = tdq.load_table(finished / "tables" / "tdq.safetensors")
    x = comparison.points.samples[:4]
    outputs = []
    for _ in range(2):
        model = comparison.prepare("tdq")
        load_weights(model, finished / "weights" / "tdq.safetensors")
        run = comparison.run.framework.simulate(tdq.load_scales(model.eval(), table))
        outputs.append(run(x, table.timesteps[0]))
    assert torch.equal(*outputs)
    expected = comparison.run.model.denoise(x, table.timesteps[0])
    assert (outputs[0] - expected).norm() < 0.5 * expected.norm()


def test_dry_run(overrides: list[str], report: dict[str, Any]) -> None:
    result = CliRunner().invoke(app, ["run", QAT.name, *overrides, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert f"activations, W8A4, by {adapter_of(report)}" in result.stdout


@pytest.mark.parametrize(
    "adapter",
    ["brevitas", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pt2e", "nncf"))],
)
def test_full_size(adapter: str, tiny_pipeline: Path, tmp_path: Path) -> None:
    settings = [
        f"adapter={adapter}",
        f"model={tiny_pipeline}",
        f"output={tmp_path}",
        "data={source: digits, validation_images: 16}",
        "threads=1",
        "dropout=0.0",
        "calibration={batches: 1, batch_size: 4}",
        "training.iterations=2",
        "training.batch_size=2",
        "validation={every: 1, batches: 1, keep: 1}",
        "evaluation={samples: 100, batch_size: 50, steps: 2, features: digits, with_score: false, "
        "seed: 1}",
    ]
    config = FULL_SIZE.configure(settings)
    assert f"TDQ, W4A4, {adapter}, " in str(FULL_SIZE.plan(config))
    folder = FULL_SIZE.run(config)
    assert (folder / "model" / "int8" / SAVED[adapter]).is_file()
    rows = json.loads((folder / "results.json").read_text())["rows"]
    assert len(rows) == 2
    (weights,) = (folder / "weights").glob("*.safetensors")
    names = [name for name in load_file(weights) if name.startswith("scale_bank.")]
    assert names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["adapter=brevitas"], r"\['nipq', 'tdq_nipq'\] add noise to weights, and brevitas rounds"),
        (["adapter=nncf", "methods=[tdq, nipq]"], r"Choose others, such as tdq\.$"),
    ],
)
def test_methods_that_a_framework_does_not_have(
    settings: list[str], message: str, tiny_pipeline: Path, tmp_path: Path
) -> None:
    config = QAT.configure([*settings, f"model={tiny_pipeline}", f"output={tmp_path}"])
    with pytest.raises(ConfigError, match=message):
        QAT.plan(config)


def test_an_exported_graph_has_no_dropout(tiny_pipeline: Path, tmp_path: Path) -> None:
    settings = [f"model={tiny_pipeline}", f"output={tmp_path}", "adapter=pt2e", "dropout=0.1"]
    with pytest.raises(ConfigError, match=r"dropout = 0\.1: the models of pt2e have none"):
        FULL_SIZE.plan(FULL_SIZE.configure([*settings, "data.source=digits"]))
