"""The example scripts run, shortened."""

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from diffusers_models import one_level_unet

from tdq_plugin.deploy.openvino import OVDenoiser

pytestmark = pytest.mark.whole

FOLDER = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """Much smaller than the examples' own model."""
    folder = tmp_path_factory.mktemp("model")
    DDIMPipeline(one_level_unet(sample_size=16), DDIMScheduler()).save_pretrained(folder)
    return folder


def test_every_example_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == {"brevitas_qat", "nncf_qat"}


def test_brevitas_qat(tmp_path, capsys, monkeypatch, pipeline):
    example = load("brevitas_qat")
    monkeypatch.setattr(example, "MODEL", pipeline)
    before, after = example.main(steps=2, sampling_steps=2, results=tmp_path)
    assert "step 0: loss" in capsys.readouterr().out
    assert 0 < after != before
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    onnx.checker.check_model(tmp_path / "model.onnx")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    # A second run starts where the first one ended.
    example.main(steps=0, sampling_steps=2, results=tmp_path)
    resumed = torch.load(tmp_path / "model.pt", weights_only=True)
    assert saved.keys() == resumed.keys()
    assert all(torch.equal(saved[name], resumed[name]) for name in saved)


@pytest.mark.slow
def test_nncf_qat(tmp_path, capsys, monkeypatch, pipeline):
    example = load("nncf_qat")
    monkeypatch.setattr(example, "MODEL", pipeline)
    options = {"sampling_steps": 2, "activation_bits": 4, "results": tmp_path}
    errors = example.main(steps=2, **options)
    assert "step 0: loss" in capsys.readouterr().out
    assert errors["torch, after"] != errors["torch, before"]
    for state in ("before", "after"):
        fake, int8 = errors[f"torch, {state}"], errors[f"OpenVINO, {state}"]
        assert 0 < int8 == pytest.approx(fake, rel=0.05)
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    assert OVDenoiser.load(tmp_path / "openvino").model.report.lost_layers == []
    # A second run starts where the first one ended.
    again = example.main(steps=0, **options)
    assert again["torch, before"] == errors["torch, after"]
