"""Calling a converted model, and its folder."""

import json
import runpy
import sys

import numpy as np
import openvino as ov
import pytest
import torch
from contract.networks import STEPS
from deploy.networks import SAMPLE

import tdq_plugin.deploy.openvino
from tdq_plugin.deploy.openvino import load_openvino, save_openvino
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES
from tdq_plugin.errors import AdapterError, LookupRuleError, TableFormatError, TimestepError

NAMES = ("openvino_model.xml", "openvino_model.bin", "scale_table.safetensors", "quantization.json")


def test_arguments_by_position_and_by_name(tiny):
    _, model = tiny
    expected = model(SAMPLE, 250)
    assert expected.dtype == torch.float32
    assert torch.equal(model(SAMPLE, timestep=250), expected)
    assert torch.equal(model(timestep=torch.tensor(250.0), sample=SAMPLE), expected)
    assert torch.equal(model(SAMPLE.double(), 250), expected)
    sample = SAMPLE.bfloat16()
    assert torch.equal(model(sample, 250), model(sample.float(), 250))
    for args, kwargs in (
        ((SAMPLE,), {}),
        ((SAMPLE, 1, 2), {}),
        ((SAMPLE, 250), {"label": 1}),
        ((SAMPLE, 250), {"timestep": 0}),
    ):
        with pytest.raises(AdapterError, match=r"takes \['sample', 'timestep'\]; it was called"):
            model(*args, **kwargs)


def test_a_wrong_timestep_is_an_error(tiny):
    _, model = tiny
    for timestep in (3, torch.tensor([0, 3, 250, 999])):
        with pytest.raises(LookupRuleError, match="Timestep 3 is not in the frozen table"):
            model(SAMPLE, timestep)
    for timesteps in ([0, 250], [250, 250]):
        with pytest.raises(TimestepError, match="2 timesteps were given for 4 samples"):
            model(SAMPLE, torch.tensor(timesteps))


def test_another_size_is_an_error(tiny):
    _, model = tiny
    with pytest.raises(AdapterError, match=r"'sample' of shape \(B, 1, 8, 8\), not \(2, 1, 16"):
        model(torch.zeros(2, 1, 16, 16), 250)


def test_few_batch_sizes_are_remembered(tiny, monkeypatch):
    _, model = tiny
    monkeypatch.setattr("tdq_plugin.deploy.openvino.model._REMEMBERED_SHAPES", 2)
    monkeypatch.setattr(model, "_compiled", {})
    outputs = [model(SAMPLE[:batch], 250) for batch in (1, 2, 3)]
    assert len(model._compiled) == 2
    again = model(SAMPLE[:1], 250)
    torch.testing.assert_close(again, outputs[0])
    # 3 is the older of 3 and 1, until it is used once more.
    model(SAMPLE[:3], 250)
    compiled = {shapes[0][0]: value for shapes, value in model._compiled.items()}
    model(SAMPLE[:2], 250)
    assert next(iter(model._compiled.values())) is compiled[3]


def test_properties_reach_openvino(tiny, tmp_path):
    _, model = tiny
    save_openvino(model, tmp_path / "model")
    loaded = load_openvino(tmp_path / "model", properties={"INFERENCE_NUM_THREADS": 1})
    loaded(SAMPLE, 250)
    (compiled,) = loaded._compiled.values()
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"


def test_a_folder_holds_the_model(tiny, tmp_path):
    frozen, model = tiny
    save_openvino(model, tmp_path / "model", extra={"run": 3})
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(NAMES)
    loaded = load_openvino(tmp_path / "model")
    assert loaded.report == model.report
    assert loaded.input_names == model.input_names
    assert torch.equal(loaded.bank.scales, frozen.scale_bank.scales)
    for timestep in (*STEPS, torch.tensor([999, 0, 250, 600])):
        assert torch.equal(loaded(SAMPLE, timestep), model(SAMPLE, timestep))
    content = json.loads((tmp_path / "model" / "quantization.json").read_text())
    assert content["extra"] == {"run": 3}
    save_openvino(loaded, tmp_path / "again")
    weights = [(tmp_path / f / "openvino_model.bin").read_bytes() for f in ("model", "again")]
    assert weights[0] == weights[1]


def test_every_runtime_reads_the_file_and_takes_the_nearest_row(tiny, tmp_path):
    _, model = tiny
    save_openvino(model, tmp_path / "model")
    read = ov.Core().read_model(tmp_path / "model" / "openvino_model.xml")
    compiled = ov.Core().compile_model(read, "CPU", DEFAULT_PROPERTIES)
    for timesteps in ([240.0], [990.0, 10, 240, 590]):
        output = compiled({"sample": SAMPLE.numpy(), "timestep": np.float32(timesteps)})[0]
        nearest = [min(STEPS, key=lambda step: abs(step - t)) for t in timesteps]
        expected = model(SAMPLE, torch.tensor(nearest))
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)


def test_openvino_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(AdapterError, match=r"pip install .* -e '\.\[openvino\]'"):
        runpy.run_path(tdq_plugin.deploy.openvino.__file__)


@pytest.mark.parametrize("name", NAMES)
def test_missing_and_truncated_files(tiny, tmp_path, name):
    _, model = tiny
    save_openvino(model, tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(TableFormatError, match=r"is not (a )?readable"):
        load_openvino(tmp_path / "model")
    path.unlink()
    with pytest.raises(TableFormatError, match=r"is not (a )?readable"):
        load_openvino(tmp_path / "model")


def test_broken_descriptions(tiny, tmp_path):
    _, model = tiny
    save_openvino(model, tmp_path / "model")
    path = tmp_path / "model" / "quantization.json"
    content = json.loads(path.read_text())
    for wrong, message in [
        ({**content, "version": 2}, "format version 2; this release reads version 1"),
        ({**content, "format": "tdq-int8"}, "is no openvino model.*save_openvino wrote"),
        ({**content, "report": {}}, "is not complete"),
        ({**content, "report": None}, "is not complete"),
    ]:
        path.write_text(json.dumps(wrong))
        with pytest.raises(TableFormatError, match=message):
            load_openvino(tmp_path / "model")
