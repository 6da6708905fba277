"""The recipe `ddim-digits-qat` from configuration to report, and after a kill."""

import json
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file
from two_processes import run_on_two_processes
from typer.testing import CliRunner

import tdq_plugin as tdq
from tdq_plugin.cli import app
from tdq_plugin.deploy import load_int8
from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.qat.model import copy_weights
from tdq_plugin.recipes.report_parts import command
from tdq_plugin.study.schema import METRICS, validate_report

pytestmark = pytest.mark.whole

QAT = find_recipe("ddim-digits-qat")
TRAINED = ["tdq_nipq", "dynamic"]
CHOSEN = [
    f"methods=[{', '.join(TRAINED)}]",
    "correction.methods=[tdq_nipq]",
    "correction.images=400",
]
SMALL = [
    "threads=1",
    "steps=4",
    "calibration.images=4",
    "training.iterations=24",
    "training.batch_size=4",
    "training.checkpoint_every=6",
    "training.log_every=1",
    "evaluation.samples=400",
    "evaluation.trajectories=4",
]


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return QAT.run(QAT.configure([*overrides, *CHOSEN]))


def test_the_report_has_a_row_for_every_method(report: dict[str, Any]) -> None:
    validate_report(report)
    rows = {row["method"]: row for row in report["rows"]}
    titles = "TDQ on NIPQ", "TDQ on NIPQ, corrected", "dynamic"
    assert tuple(rows) == ("float32", *titles)
    for title in titles:
        row = rows[title]
        assert row["execution"] == ("fake" if title == "dynamic" else "int8")
        known = set(METRICS) - ({"trajectory_mse_unseen"} if "corrected" in title else set())
        assert {metric for metric in METRICS if row[metric] is not None} == known
        assert all(row[metric] > 0 for metric in known)
    assert list(report["methods"]) == ["TDQ on NIPQ", "dynamic"]
    assert any(note.startswith("Corrected: ") for note in report["notes"])


def test_without_a_table_no_model_is_saved(overrides: list[str]) -> None:
    settings = ["methods=[dynamic]", "name=no-table", "training.iterations=2"]
    folder = QAT.run(QAT.configure([*overrides, *settings]))
    report = json.loads((folder / "report.json").read_text())
    assert [row["method"] for row in report["rows"]] == ["float32", "dynamic"]
    assert report["size_bytes"]["int8"] is None
    assert report["size_bytes"]["float32"] > 0
    assert not (folder / "model").exists()
    page = (folder / "report.html").read_text()
    assert "so no int8 model was saved" in page
    assert "smaller than float32" not in page


def test_a_method_can_have_its_own_learning_rate_of_the_weights(
    overrides: list[str], tiny_pipeline: Path
) -> None:
    settings = ["methods=[dynamic, lsq]", "weight_learning_rates={lsq: 1.0e-20}", "name=own-rate"]
    folder = QAT.run(QAT.configure([*overrides, *settings, "training.iterations=2"]))
    original = UNet2DModel.from_pretrained(tiny_pipeline, subfolder="unet").state_dict()
    for method, unchanged in (("dynamic", False), ("lsq", True)):
        weights = load_file(folder / "weights" / f"{method}.safetensors")
        shared = [name for name in weights if name.endswith("conv1.weight")]
        assert shared
        same = [torch.equal(weights[name], original[name]) for name in shared]
        assert all(same) if unchanged else not any(same)


def test_a_correction_brings_the_mean_of_the_samples_nearer(finished: Path) -> None:
    images = {
        name: load_file(finished / "rows" / f"{name}.int8.safetensors")["images"]
        for name in ("tdq_nipq", "tdq_nipq_corrected")
    }
    (float_images,) = (finished.parent / "float-images").glob("*.safetensors")
    wanted = load_file(float_images)["images"][:400].mean(0)
    distances = {name: (drawn.mean(0) - wanted).norm() for name, drawn in images.items()}
    assert distances["tdq_nipq_corrected"] < distances["tdq_nipq"]


def test_the_command_of_the_report_gives_the_same_configuration(
    report: dict[str, Any], overrides: list[str]
) -> None:
    program, verb, name, *repeated = shlex.split(report["command"])
    assert (program, verb) == ("tdq", "run")
    again = find_recipe(name).configure([*repeated, overrides[-1]])
    assert again == QAT.configure([*overrides, *CHOSEN])


def test_training_lowers_the_loss(finished: Path) -> None:
    for name in TRAINED:
        records = [
            json.loads(line)
            for line in (finished / "logs" / f"{name}.jsonl").read_text().splitlines()
        ]
        assert [record["step"] for record in records] == list(range(1, 25))
        losses = [record["loss"] for record in records]
        assert sum(losses[-8:]) < sum(losses[:8])


def test_the_saved_model_draws(finished: Path) -> None:
    unet = UNet2DModel.from_config(UNet2DModel.load_config(finished / "model" / "unet"))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([0, 250])
    integer = load_int8(finished / "model" / "int8", unet, (x, t))
    with torch.no_grad():
        assert integer(x, 250).isfinite().all()
        correction = tdq.load_correction(finished / "model" / "output_correction.safetensors")
        assert not torch.equal(tdq.CorrectedDenoiser(integer, correction)(x, 250), integer(x, 250))
    assert tdq.load_table(finished / "tables" / "tdq_nipq.safetensors").timesteps.tolist() == [
        0.0, 125.0, 250.0, 375.0, 500.0, 625.0, 750.0, 875.0
    ]  # fmt: skip


def test_a_killed_run_ends_in_the_same_weights(finished: Path, overrides: list[str]) -> None:
    """Killed by the system at an arbitrary step, in another process."""
    settings = [*overrides, "name=killed", "methods=[tdq_nipq]"]
    config = QAT.configure(settings)
    program = "import sys; from tdq_plugin.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", program, "run", QAT.name, *settings], stderr=subprocess.DEVNULL
    )
    log = config.run_folder / "logs" / "tdq_nipq.jsonl"
    while not (log.exists() and len(log.read_text().splitlines()) >= 8):
        assert process.poll() is None, "it ended before it was killed"
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (config.run_folder / "weights").exists()
    checkpoint = torch.load(
        config.run_folder / "checkpoints" / "tdq_nipq.pt", weights_only=True, map_location="cpu"
    )
    assert 0 < checkpoint["step"] < 24
    resumed = QAT.run(config)
    weights, expected = (
        load_file(folder / "weights" / "tdq_nipq.safetensors") for folder in (resumed, finished)
    )
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    logs = [folder / "logs" / "tdq_nipq.jsonl" for folder in (resumed, finished)]
    assert logs[0].read_text() == logs[1].read_text()


def test_a_finished_run_does_nothing_again(finished: Path, overrides: list[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "weights").iterdir()}
    QAT.run(QAT.configure([*overrides, *CHOSEN]))
    assert {path: path.stat().st_mtime_ns for path in (finished / "weights").iterdir()} == before


def test_a_run_folder_belongs_to_one_configuration(finished: Path, overrides: list[str]) -> None:
    other = QAT.configure([*overrides, "methods=[lsq]", f"name={finished.name}"])
    with pytest.raises(
        ConfigError, match=r"holds a run with other settings: .*methods=.*, not \['lsq'\]"
    ):
        QAT.run(other)


def test_dry_run_prints_the_plan_and_writes_nothing(tiny_pipeline: Path, tmp_path: Path) -> None:
    arguments = ["run", QAT.name, f"model={tiny_pipeline}", f"output={tmp_path}", "--dry-run"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "tdq run ddim-digits-qat" in result.stdout
    assert "steps       400 for each of 10 methods, batches of 32" in result.stdout
    assert "weights 0.0003 for lsq, tdq, pact, " in result.stdout
    assert "; 0.001 for tdq_pact, nipq, dynamic" in result.stdout
    assert " GB: " in result.stdout
    assert "4,500 images" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trackers=[trackio]", r"^trackers = \['trackio'\]: trackio is not installed"),
        ("trained=no/such", r"^trained = 'no/such' has no weights of 'lsq': .* does not exist"),
    ],
)
def test_what_would_stop_a_run_stops_its_plan(
    override: str, message: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tdq_plugin.recipes.qat.training_log.find_spec", lambda name: None)
    config = QAT.configure([*overrides, override, "name=stopped", "methods=[lsq]"])
    for do in (QAT.plan, QAT.run):
        with pytest.raises(ConfigError, match=message):
            do(config)
    assert not config.run_folder.exists()


def test_training_without_data(overrides: list[str]) -> None:
    settings = ["methods=[table_10]", "objective=data_free_distillation", "training.iterations=2"]
    settings += ["name=data-free", "scale_history=[0, 2]"]
    folder = QAT.run(QAT.configure([*overrides, *settings]))
    assert (folder / "report.html").is_file()
    before, after = (
        tdq.load_table(folder / "scales" / "table_10" / f"{step}.safetensors") for step in (0, 2)
    )
    assert len(before.timesteps) == len(after.timesteps) == 1000
    assert not torch.equal(before.scales, after.scales)
    assert len(list((folder / "scales" / "table_10").iterdir())) == 2


def test_trained_weights_are_measured_with_other_steps(
    finished: Path, overrides: list[str]
) -> None:
    settings = ["methods=[tdq_nipq]", "steps=2", f"trained={finished}", "name=fewer-steps"]
    folder = QAT.run(QAT.configure([*overrides, *settings]))
    copied, original = (
        (run / "weights" / "tdq_nipq.safetensors").read_bytes() for run in (folder, finished)
    )
    assert copied == original
    assert not (folder / "logs").exists()
    table = tdq.load_table(folder / "tables" / "tdq_nipq.safetensors")
    assert table.timesteps.tolist() == [0.0, 250.0, 500.0, 750.0]
    rows = json.loads((folder / "report.json").read_text())["rows"]
    assert [row.get("key") for row in rows] == [None, "tdq_nipq"]


def test_two_processes_train_and_one_of_them_measures(overrides: list[str]) -> None:
    settings = ["methods=[lsq]", "evaluation.samples=100", "training.iterations=2"]
    run_on_two_processes(QAT.name, *overrides, *settings, "name=two")
    two, one = (
        QAT.configure([*overrides, *settings, f"name={name}"]).run_folder for name in ("two", "one")
    )
    QAT.run(QAT.configure([*overrides, *settings, "name=one"]))
    rows = [json.loads((folder / "report.json").read_text())["rows"][1] for folder in (one, two)]
    for metric in ("trajectory_mse", "pixel_mse", "frechet_distance_to_float"):
        assert rows[1][metric] == pytest.approx(rows[0][metric], rel=1e-2)


def test_only_weights_that_fit_are_taken(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no weights of 'lsq': .*lsq.safetensors does not"):
        copy_weights(finished, "lsq", QAT.configure([]), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"is a run with bits=W4A4, not W8A8\."):
        copy_weights(finished, "dynamic", QAT.configure(["bits=W8A8"]), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"is a run with model=.*pipeline, not .*ddim-digits\."):
        copy_weights(finished, "dynamic", QAT.configure([]), tmp_path / "x")
    with pytest.raises(ConfigError, match=r"is a run with adapter=torch_ao, not nncf\."):
        copy_weights(finished, "dynamic", QAT.configure(["adapter=nncf"]), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "scale_history=[0, 401]",
            r"^scale_history = \[0, 401\]: training has only 400 iterations",
        ),
        ("bits=W9A9", r"^bits = 'W9A9': write bits of weights and activations as W8A4"),
        ("methods=[]", r"^methods = \[\]: List should have at least 1 item"),
        ("methods=[tdk]", r"^methods = \['tdk'\]: .*are no methods; choose from .*'tdq_nipq'"),
        ("scale_learning_rates={lsq: 1}", r"^scale_learning_rates = .*'tdq'.* no learning rate"),
        (
            "weight_learning_rates.tdk=1",
            r"^weight_learning_rates = .*\['tdk'\] are no methods; choose from .*'lsq'",
        ),
        ("weight_learning_rates.lsq=0", r"^weight_learning_rates\.lsq = 0: .*greater than 0"),
        ("objective=x", r"^objective = 'x': Input should be 'noise', 'distillation' or"),
        ("training.ema_decay=1", r"^training\.ema_decay = 1: Input should be less than 1"),
        ("training.rate=1", r"^Unknown key 'training.rate'. Known keys: batch_size, "),
        ("correction.methods=[tdk]", r"^correction = .*methods: \['tdk'\] are not among methods"),
        ("trackers=[x]", r"^trackers\.0 = 'x': Input should be 'tensorboard', 'trackio' or"),
        ("evaluation.seed=0", r"^evaluation = .*calibration would see the noise of the test"),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QAT.configure([override])


def test_a_bare_no_is_a_text_as_in_the_command_of_a_report() -> None:
    config = QAT.configure(["training.mixed_precision=no", "name='2026'", "trained='no'"])
    assert (config.training.mixed_precision, config.name) == ("no", "2026")
    repeated = shlex.split(command(QAT.name, config))[3:]
    assert QAT.configure(repeated) == config


@pytest.mark.parametrize("name", ["{bits}-mine", "@mine", "%mine", "a: b", "[x"])
def test_a_text_that_is_no_yaml_can_be_given_again(name: str) -> None:
    config = QAT.configure([f"name='{name}'"])
    assert config.name == name
    assert QAT.configure(shlex.split(command(QAT.name, config))[3:]) == config


def test_a_name_that_cannot_be_filled_in() -> None:
    config = QAT.configure(["name=x-{draw}"])
    with pytest.raises(ConfigError, match=r"name = 'x-\{draw\}': only .*\{bits\}"):
        _ = config.run_folder


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    config = QAT.configure([f"model={tmp_path / 'none'}", f"output={tmp_path / 'runs'}"])
    with pytest.raises(ConfigError, match=r"none' is neither the folder of a saved"):
        QAT.run(config)
    assert not config.run_folder.exists()
