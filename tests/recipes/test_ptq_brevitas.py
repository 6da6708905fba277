"""The PTQ recipe through Brevitas: the same report, fake quantization, and an ONNX file."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

import tdq_plugin as tdq
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
    "adapter=brevitas",
    "threads=1",
    "bits=W4A8",
    "steps=2",
    "int8_methods=[lsq, tdq]",
    "fake_methods=[tdq, dynamic]",
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


@pytest.fixture
def states(finished: Path, unet: UNet2DModel) -> MethodStates:
    """The run's methods, in a model that is prepared anew."""
    x, t = torch.randn(2, *image_shape(unet)), torch.tensor([0, 500])
    model = load_framework("brevitas").prepare(unet, CalibrationSet(x, t), Bits(4, 8))
    state = RunState(finished, json.loads((finished / "config.json").read_text()))
    return MethodStates(state, model)


def test_the_report_is_that_of_the_recipe(report: dict[str, Any], finished: Path) -> None:
    validate_report(report)
    rows = {(row["method"], row["execution"]) for row in report["rows"]}
    expected = {(METHODS[name].title, "fake") for name in ("lsq", "tdq", "dynamic")}
    assert rows == expected | {("float32", "float32")}
    for row in report["rows"][1:]:
        assert all(row[metric] > 0 for metric in METRICS)
    assert "adapter=brevitas" in report["command"]
    assert "brevitas" in finished.name
    assert (finished / "report.html").stat().st_size > 10_000


def test_latency_tells_that_it_is_no_integer_execution(report: dict[str, Any]) -> None:
    latency = report["latency"]
    assert latency["static_int8"] == 1.0
    assert min(latency[name] for name in ("float32", "tdq_int8", "dynamic_int8")) > 0
    assert "fake quantization" in latency["unit"]


def test_size_is_that_of_the_saved_model(report: dict[str, Any], finished: Path) -> None:
    saved = [file.stat().st_size for file in (finished / "model").rglob("*") if file.is_file()]
    assert report["size_bytes"]["int8"] == sum(saved)


@torch.no_grad()
def test_the_saved_model_runs_in_onnxruntime(finished: Path, states: MethodStates) -> None:
    model = states.load("tdq")
    path = finished / "model" / "int8" / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    scheduler = DDIMScheduler.from_pretrained(finished / "model" / "scheduler")
    x = torch.randn(3, *image_shape(model), generator=torch.Generator().manual_seed(0))

    def predict(timestep: torch.Tensor) -> torch.Tensor:
        feed = {"sample": x.numpy(), "timestep": timestep.numpy()}
        return torch.from_numpy(session.run(None, feed)[0])

    for timestep in scheduler_with(scheduler, 2).timesteps:
        expected = model(x, timestep, return_dict=False)[0]
        # Where float rounding moves one activation to the next code, others follow.
        assert (predict(timestep) - expected).norm() < 0.05 * expected.norm()
    assert predict(torch.tensor(250)).isnan().all()


@torch.no_grad()
def test_the_inference_mode_computes_what_the_model_does(states: MethodStates) -> None:
    brevitas = load_framework("brevitas")
    for name in ("lsq", "tdq", "dynamic"):
        model = states.load(name)
        x = torch.randn(2, *image_shape(model))
        run = brevitas.simulate(model)
        for timestep in (0, 500, 250):
            assert torch.equal(run(x, timestep), model(x, timestep, return_dict=False)[0])
    # Each has a copy of the model: what is loaded later does not change it.
    before = run(x, 500)
    states.load("tdq")
    assert torch.equal(run(x, 500), before)
    assert torch.equal(brevitas.deploy_dynamic(states.load("tdq"))(x, 500), before)


def test_the_float_model_stays_as_it_is(unet: UNet2DModel, states: MethodStates) -> None:
    states.load("tdq")
    assert type(unet.conv_in) is torch.nn.Conv2d
    x = torch.randn(2, *image_shape(unet))
    run = load_framework("brevitas").deploy_float(unet, CalibrationSet(x, torch.zeros(2)))
    with torch.no_grad():
        assert torch.equal(run(x, 500), unet(x, 500).sample)


def test_the_first_and_the_last_layer_have_8_bits(states: MethodStates) -> None:
    model = states.load("lsq")
    bits = {layer: int(layer.weight_quant.bit_width()) for layer in (model.conv_in, model.conv_out)}
    assert set(bits.values()) == {8}
    inner = model.down_blocks[0].resnets[0].conv1
    assert int(inner.weight_quant.bit_width()) == 4
    assert {grid.bits for grid in tdq.scale_bank(model).grids} == {8}


def test_brevitas_rounds_weights_itself(overrides: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"learn_rounding = true: brevitas rounds weights"):
        PTQ.run(PTQ.configure([*overrides, "reconstruction.learn_rounding=true"]))
