"""The folder of an int8 model."""

import json

import pytest
import torch
from contract.networks import TinyDenoiser, example_inputs
from deploy.networks import SAMPLE, WithEncoder, frozen, frozen_tiny
from torch import nn

from tdq_plugin.deploy import load_int8, lower_to_int8, save_int8
from tdq_plugin.errors import AdapterError, TableFormatError, TableMismatchError

MIXED = torch.tensor([999, 0, 250, 600])


@pytest.fixture
def folder(tmp_path):
    save_int8(lower_to_int8(frozen_tiny()), tmp_path / "int8", extra={"steps": 5})
    return tmp_path / "int8"


def load(folder, model=None):
    return load_int8(folder, model or TinyDenoiser(), example_inputs())


@pytest.mark.parametrize("qat", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
@pytest.mark.parametrize("cache", [True, False])
def test_loaded_model_is_bit_equal(tmp_path, qat, bits, cache):
    saved = lower_to_int8(frozen_tiny(qat=qat, bits=bits), cache_timestep_path=cache)
    save_int8(saved, tmp_path / "int8")
    torch.manual_seed(7)
    architecture = TinyDenoiser()
    weight = architecture.conv_in.weight.clone()
    loaded = load(tmp_path / "int8", architecture)
    for timestep in (250, MIXED):
        assert torch.equal(loaded(SAMPLE, timestep), saved(SAMPLE, timestep))
    assert torch.equal(architecture.conv_in.weight, weight)
    save_int8(loaded, tmp_path / "again")
    for name in ("model.safetensors", "quantization.json"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("int8", "again"))
        assert first == second


@pytest.mark.parametrize("qat", [True, False])
def test_a_module_that_is_called_as_a_whole_stays_float(tmp_path, qat):
    with pytest.warns(UserWarning, match=r"1 operations stay float.*encoder \(TransformerEncoder"):
        model = frozen(model=WithEncoder(), qat=qat)
    assert type(model.encoder.linear1) is type(model.encoder.linear2) is nn.Linear
    assert not any(hasattr(m, "weight_fake_quant") for m in model.encoder.modules())
    with_gradients = model(SAMPLE, MIXED)
    with torch.no_grad():
        # Without gradients torch computes the encoder in one kernel, past its layers.
        torch.testing.assert_close(model(SAMPLE, MIXED), with_gradients, rtol=1e-5, atol=1e-5)
    saved = lower_to_int8(model)
    assert set(saved.meta["tdq_int8"].weight_bits) == {"first", "last"}
    save_int8(saved, tmp_path / "int8")
    loaded = load(tmp_path / "int8", WithEncoder())
    assert torch.equal(loaded(SAMPLE, MIXED), saved(SAMPLE, MIXED))


def test_a_weight_quantizer_that_is_switched_off_is_not_saved(tmp_path):
    model = frozen()
    model.conv_out.weight_fake_quant.enable_fake_quant(False)
    saved = lower_to_int8(model)
    assert type(saved.conv_out) is nn.Conv2d
    save_int8(saved, tmp_path / "int8")
    assert torch.equal(load(tmp_path / "int8")(SAMPLE, MIXED), saved(SAMPLE, MIXED))


def test_files_hold_no_float_weights(tmp_path):
    class Wide(TinyDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.conv_down = nn.Conv2d(8, 512, 3, stride=2, padding=1)
            self.conv_up = nn.Conv2d(512, 8, 3, padding=1)

        def forward(self, sample, timestep):
            return self.conv_up(self.conv_down(self.conv_in(sample * timestep.view(-1, 1, 1, 1))))

    weights = 2 * 8 * 512 * 9
    for bits in (8, 4):
        save_int8(lower_to_int8(frozen(model=Wide(), bits=bits)), tmp_path / f"{bits}")
        size = (tmp_path / f"{bits}" / "model.safetensors").stat().st_size
        assert weights * bits / 8 < size < weights * bits / 8 + 12000


def test_linear_lookup_survives(tmp_path):
    saved = lower_to_int8(frozen_tiny(lookup="linear"), cache_timestep_path=False)
    save_int8(saved, tmp_path / "int8")
    assert torch.equal(load(tmp_path / "int8")(SAMPLE, 130), saved(SAMPLE, 130))


class Renoiser(TinyDenoiser):
    def forward(self, sample, sigma):
        return super().forward(sample, sigma)


def test_a_timestep_argument_of_another_name_survives(tmp_path):
    saved = lower_to_int8(frozen(model=Renoiser(), timestep_argument="sigma"))
    save_int8(saved, tmp_path / "int8")
    loaded = load(tmp_path / "int8", Renoiser())
    assert torch.equal(loaded(SAMPLE, sigma=250), saved(SAMPLE, sigma=250))


def test_folders_that_do_not_name_the_timestep_argument(folder):
    path = folder / "quantization.json"
    content = json.loads(path.read_text())
    assert content.pop("timestep_argument") == "timestep"
    path.write_text(json.dumps(content))
    assert torch.equal(load(folder)(SAMPLE, 250), lower_to_int8(frozen_tiny())(SAMPLE, 250))


def test_extra_facts_are_in_the_description(folder):
    assert json.loads((folder / "quantization.json").read_text())["extra"] == {"steps": 5}


@pytest.mark.parametrize("name", ["model.safetensors", "scale_table.safetensors"])
def test_truncated_and_missing_files(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-20])
    with pytest.raises(TableFormatError, match=f"{name} is not a readable safetensors file"):
        load(folder)
    (folder / name).unlink()
    with pytest.raises(TableFormatError, match=f"{name} is not a readable safetensors file"):
        load(folder)


def test_broken_description(folder):
    path = folder / "quantization.json"
    content = json.loads(path.read_text())
    for wrong, message in [
        ({**content, "version": 2}, "format version 2; this release reads version 1"),
        ({**content, "format": "other"}, "is no int8 model"),
        ({**content, "operands": None}, "is not complete"),
        ({key: content[key] for key in ("format", "version")}, "is not complete"),
    ]:
        path.write_text(json.dumps(wrong))
        with pytest.raises(TableFormatError, match=message):
            load(folder)
    path.write_text("{")
    with pytest.raises(TableFormatError, match="is not readable JSON"):
        load(folder)
    path.unlink()
    with pytest.raises(TableFormatError, match="is not readable JSON"):
        load(folder)


class Wider(TinyDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Linear(4, 1)
        self.conv_in = nn.Conv2d(1, 8, 5, padding=2)


class Renamed(TinyDenoiser):
    def __init__(self) -> None:
        super().__init__()
        self.first = self.conv_in
        del self.conv_in

    def forward(self, sample, timestep):
        return self.first(sample) * timestep.view(-1, 1, 1, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wider(), "another architecture than this"),
        (Renamed(), "which this model does not have"),
        (TinyDenoiser(attention=False), "which this model does not have"),
    ],
)
def test_other_architecture(folder, model, message):
    with pytest.raises(TableMismatchError, match=message):
        load(folder, model)


def test_only_lowered_models_with_a_table_are_saved(tmp_path):
    model = frozen_tiny()
    with pytest.raises(AdapterError, match="Call lower_to_int8"):
        save_int8(model, tmp_path / "int8")
    with pytest.raises(AdapterError, match="activations='table'"):
        save_int8(lower_to_int8(model, activations="dynamic"), tmp_path / "int8")
    assert not (tmp_path / "int8").exists()
