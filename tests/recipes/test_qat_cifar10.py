"""The recipe `ddim-cifar10-qat`: tiny from end to end, on two processes, and at its real size."""

import json
import re
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers_models import ddpm_cifar10
from safetensors.torch import load_file
from two_processes import run_on_two_processes

from tdq_plugin.deploy import load_int8
from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes import find_recipe
from tdq_plugin.recipes.calibration import placeholder
from tdq_plugin.recipes.image_data import load_images
from tdq_plugin.recipes.qat import full_size
from tdq_plugin.recipes.qat.best_checkpoints import BestCheckpoints
from tdq_plugin.recipes.qat.full_size import prepare_method, train_best
from tdq_plugin.recipes.qat.stages import start

pytestmark = pytest.mark.whole

QAT = find_recipe("ddim-cifar10-qat")
WITHOUT_NETWORK = ["data={source: digits, validation_images: 16}", "evaluation.features=digits"]
SMALL = [
    *WITHOUT_NETWORK,
    "threads=1",
    "dropout=0.0",
    "calibration.batches=2",
    "calibration.batch_size=4",
    "training.iterations=6",
    "training.batch_size=4",
    "training.warmup=2",
    "training.log_every=2",
    "training.checkpoint_every=2",
    "validation={every: 1, batches: 1, keep: 2}",
    "evaluation.samples=100",
    # Two processes have other numbers of batches.
    "evaluation.batch_size=40",
    "evaluation.steps=2",
]


@pytest.fixture(scope="module")
def finished(overrides: list[str]) -> Path:
    return QAT.run(QAT.configure([*overrides, "name=one"]))


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def test_input_dependent_scales_are_judged_and_not_saved(overrides: list[str]) -> None:
    settings = ["method=dynamic", "name=dynamic", "training.iterations=2"]
    folder = QAT.run(QAT.configure([*overrides, *settings]))
    found = results(folder)
    assert found["method"] == "dynamic"
    assert len(found["rows"]) == 3
    assert not (folder / "model").exists()


def test_the_best_weights_are_judged_beside_the_float_model(finished: Path) -> None:
    found = results(finished)
    assert (found["method"], found["bits"], found["samples"]) == ("TDQ", "W4A4", 100)
    assert "not the FID" in found["feature_space"]
    float_row, *rows = found["rows"]
    assert float_row["model"] == "float32"
    losses = [row["validation_loss"] for row in rows]
    logged = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    validated = sorted(record["validation_loss"] for record in logged if len(record) == 2)
    assert losses == validated[:2]
    assert len(validated) == 6
    assert all(row["frechet_distance"] > 0 and row["inception_score"] >= 1 for row in rows)
    kept = sorted(path.stem for path in (finished / "weights").glob("*.safetensors"))
    assert kept == sorted(row["model"] for row in rows)


def test_the_saved_model_draws(finished: Path) -> None:
    unet = UNet2DModel.from_config(UNet2DModel.load_config(finished / "model" / "unet"))
    x, t = torch.randn(2, 1, 16, 16), torch.tensor([0, 500])
    integer = load_int8(finished / "model" / "int8", unet, (x, t))
    with torch.no_grad():
        assert integer(x, 500).isfinite().all()


def test_results_do_not_wait_for_the_model(
    finished: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise OSError("No space left on device")

    before = results(finished)
    (finished / "results.json").unlink()
    monkeypatch.setattr(full_size, "save_model", fail)
    with pytest.raises(OSError, match="No space"):
        QAT.run(QAT.configure([*overrides, "name=one"]))
    assert results(finished) == before


def test_two_processes_do_what_one_does(finished: Path, overrides: list[str]) -> None:
    run_on_two_processes(QAT.name, *overrides, "name=two")
    two = finished.with_name("two")
    first, second = results(finished)["rows"], results(two)["rows"]
    assert [row["model"] for row in first] == [row["model"] for row in second]
    for one, other in zip(first, second, strict=True):
        assert other["frechet_distance"] == pytest.approx(one["frechet_distance"], rel=2e-2)
    checkpoints = [
        torch.load(folder / "checkpoint.pt", weights_only=True, map_location="cpu")["model"]
        for folder in (finished, two)
    ]
    for name, expected in checkpoints[0].items():
        torch.testing.assert_close(checkpoints[1][name], expected, rtol=1e-3, atol=2e-5)
    # Records of losses and norms are means over both processes.
    logs = [(folder / "log.jsonl").read_text().splitlines() for folder in (finished, two)]
    for one, other in zip(*(map(json.loads, lines) for lines in logs), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_restart_repeats_nothing(
    finished: Path, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tdq_plugin.recipes.qat.training import Training

    config = QAT.configure([*overrides, "name=interrupted"])
    original = Training.advance
    steps: list[int] = []

    def interrupted(training: Any, objective: Any) -> Any:
        steps.append(training.step)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return original(training, objective)

    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        QAT.run(config)
    folder = QAT.run(config)
    assert steps == [0, 1, 2, 3, 2, 3, 4, 5]
    assert results(folder) == results(finished)
    for path in (finished / "weights").glob("*.safetensors"):
        again = load_file(folder / "weights" / path.name)
        assert all(torch.equal(again[name], value) for name, value in load_file(path).items())


def test_what_may_change_while_a_run_goes_on(
    finished: Path, overrides: list[str], tmp_path: Path
) -> None:
    shutil.copytree(finished, tmp_path / "one")
    moved = [*overrides, "name=one", f"output={tmp_path}"]
    again = [*moved, "threads=2", "evaluation.batch_size=50", "training.log_every=3"]
    folder = QAT.run(QAT.configure([*again, "training.checkpoint_every=3"]))
    assert results(folder) == results(finished)
    assert json.loads((folder / "config.json").read_text())["training"]["log_every"] == 3
    rows = results(QAT.run(QAT.configure([*moved, "evaluation.seed=7"])))["rows"]
    for row, before in zip(rows, results(finished)["rows"], strict=True):
        assert row["model"] == before["model"]
        assert row["frechet_distance"] != before["frechet_distance"]
    with pytest.raises(ConfigError, match=r"with other settings: dropout=0\.0, not 0\.5\. "):
        QAT.run(QAT.configure([*moved, "dropout=0.5"]))
    free = QAT.configure([*moved, "objective=data_free_distillation"]).changeable
    assert "evaluation.steps" in QAT.configure(moved).changeable - free


def test_a_sampler_with_too_many_steps(overrides: list[str]) -> None:
    config = QAT.configure([*overrides, "name=steps", "evaluation.steps=1001"])
    message = r"cannot have steps = 1001: .* has 1000 timesteps\. Set steps .* to 1000 or less"
    for do in (QAT.plan, QAT.run):
        with pytest.raises(ConfigError, match=message):
            do(config)


@pytest.fixture(scope="module")
def cifar10_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The architecture of google/ddpm-cifar10-32, with random weights."""
    unet = ddpm_cifar10()
    folder = tmp_path_factory.mktemp("cifar10") / "pipeline"
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(folder)
    return folder


def test_the_real_size_trains(cifar10_pipeline: Path, tmp_path: Path) -> None:
    """The real configuration; only the number of steps and samples is small."""
    settings = [
        *WITHOUT_NETWORK,
        f"model={cifar10_pipeline}",
        f"output={tmp_path}",
        "threads=1",
        "calibration.batches=1",
        "calibration.batch_size=2",
        "training.batch_size=1",
        "training.iterations=1",
        "training.warmup=0",
        "validation.batches=1",
    ]
    config = QAT.configure(settings)
    described = str(QAT.plan(config))
    assert "35,746,307 parameters" in described
    assert "TDQ, W4A4, " in described
    assert "4,984 images and 16 for validation" in described
    assert "compared with 5,000 real images" in described
    total, state = map(float, re.findall(r"(\d+\.\d+)(?: GB:| for param)", described))
    # 20 bytes for each parameter, two copies of the quantized weights, and the float model.
    assert 1.05 < state < 1.35
    assert state + 0.05 < total < state + 0.4
    run = start(config)
    quantized = prepare_method(config, run.framework, run.model, placeholder(run.model))
    before = quantized.get_parameter("mid_block.resnets.0.conv1.weight").detach().clone()
    best = BestCheckpoints(config.run_folder / "weights", 5)
    train_best(run, quantized, *load_images(config.data, run.model.image_shape), best)
    assert list(best.losses()) == [1]
    after = quantized.get_parameter("mid_block.resnets.0.conv1.weight")
    assert not torch.equal(after, before)
    names = quantized.scale_bank.names
    assert not {"conv_in.input", "conv_out.input"} & set(names)
    assert {grid.bits for grid in quantized.scale_bank.grids} == {4}


def test_the_configuration_is_that_of_the_paper() -> None:
    config = QAT.configure()
    training, evaluation = config.training, config.evaluation
    assert (training.iterations, training.batch_size) == (200_000, 128)
    assert (evaluation.samples, evaluation.steps, evaluation.features) == (50_000, 200, "inception")
    assert config.validation.keep == 5
    assert config.run_folder == Path("runs/ddim-cifar10-qat-torch_ao-tdq-W4A4-seed0")


@pytest.mark.skipif(find_spec("torch_fidelity") is not None, reason="torch-fidelity is installed")
def test_the_run_stops_before_it_starts_without_inception(tiny_pipeline: Path) -> None:
    config = QAT.configure([f"model={tiny_pipeline}", WITHOUT_NETWORK[0]])
    with pytest.raises(ConfigError, match=r"evaluation.features = 'inception' needs torch_fidel"):
        QAT.run(config)
    plan = QAT.plan(config)
    assert re.search(r"installed +missing: torch_fidelity, .*the run would stop", plan)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("method=tdk", r"^method = 'tdk': .*choose from .*'tdq_paper'"),
        ("float_layers=conv_in", r"^float_layers = 'conv_in': Input should be a valid list"),
        (
            "training.learning_rate=.inf",
            r"^training\.learning_rate = inf: Input should be a finite number",
        ),
        ("scale_learning_rate=.nan", r"^scale_learning_rate = nan: Input should be a finite num"),
        ("validation.keep=0", r"^validation\.keep = 0: Input should be greater than 0"),
        ("data.source=x", r"^data\.source = 'x': Input should be 'digits', 'folder' or 'hub'"),
        ("training.mixed_precision=fp8", r"^training\.mixed_precision = 'fp8': Input should be"),
    ],
)
def test_mistakes_in_the_configuration(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QAT.configure([override])
