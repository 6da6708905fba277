"""Models on disk: through the adapter's functions, and through NNCF's own."""

import json

import nncf.torch
import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser
from nncf.torch.function_hook.wrapper import is_wrapped

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import load_quantized, save_quantized
from tdq_plugin.errors import AdapterError, TableFormatError, TableMismatchError, TimestepError

SAMPLE = BATCHES[2][0][:4]


@pytest.fixture
def saved(make, tmp_path):
    save_quantized(tdq.freeze(make(4, 4), STEPS), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("bank", [tdq.GeneratorBank, tdq.ConstantBank, "frozen"])
def test_round_trip(make, tmp_path, bits, bank):
    model = make(bits, bits)
    if bank == "frozen":
        tdq.freeze(model, STEPS, lookup="nearest")
    elif bank is tdq.ConstantBank:
        tdq.set_scale_bank(model, constant(model))
    save_quantized(model, tmp_path / "model")
    options = {} if bank == "frozen" else {"bank": bank}
    torch.manual_seed(5)
    restored = load_quantized(TinyDenoiser().eval(), tmp_path / "model", **options)
    assert type(tdq.scale_bank(restored)) is type(tdq.scale_bank(model))
    assert restored.state_dict().keys() == model.state_dict().keys()
    assert not any(module.training for module in restored.modules())
    for step in (*STEPS, 3):
        assert torch.equal(restored(SAMPLE, step), model(SAMPLE, step))


def test_modes_and_estimators_come_back(make, tmp_path):
    model = make()
    for _, quantizer in tdq.named_quantizers(model):
        quantizer.mode, quantizer.estimator = "dynamic", "pact"
    save_quantized(model, tmp_path / "model")
    restored = load_quantized(TinyDenoiser().eval(), tmp_path / "model")
    assert torch.equal(restored(SAMPLE, 250), model(SAMPLE, 250))
    assert {quantizer.estimator for _, quantizer in tdq.named_quantizers(restored)} == {"pact"}


def constant(model):
    bank = tdq.ConstantBank(dict(zip(model.scale_bank.names, model.scale_bank.grids, strict=True)))
    bank.set_static(model.scale_bank.base_scale[:, 0] * 1.1, model.scale_bank.zero_point[:, 0])
    return bank


def test_restored_model_can_be_trained(make, tmp_path):
    save_quantized(make(), tmp_path / "model")
    restored = load_quantized(TinyDenoiser(), tmp_path / "model").train()
    restored(SAMPLE, torch.tensor(STEPS[:4])).square().mean().backward()
    assert restored.scale_bank.weights[-1].grad.abs().sum() > 0


@pytest.mark.parametrize("bits", [8, 4])
def test_nncf_s_own_way(make, bits):
    """`load_from_config` must be told that the package's module may be imported."""
    model = make(bits, bits)
    config = json.loads(json.dumps(nncf.torch.get_config(model)))
    with pytest.raises(nncf.InternalError, match="untrusted path 'tdq_plugin"):
        nncf.torch.load_from_config(TinyDenoiser(), config)
    allowed = ("nncf.*", "tdq_plugin.*")
    restored = nncf.torch.load_from_config(TinyDenoiser().eval(), config, allowed_modules=allowed)
    tdq.attach(restored).load_state_dict(model.state_dict())
    assert torch.equal(restored(SAMPLE, 250), model(SAMPLE, 250))


def test_a_write_that_fails_leaves_the_old_folder(saved, make, monkeypatch):
    before = (saved / "quantization.json").read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("tdq_plugin.adapters.nncf.save.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_quantized(make(), saved)
    assert (saved / "quantization.json").read_bytes() == before
    assert len(list(saved.parent.iterdir())) == 1


def change(folder, **entries):
    path = folder / "quantization.json"
    content = json.loads(path.read_text()) | entries
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "removed"}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"format": "other"}, "is no NNCF model"),
        ({"version": 2}, "format version 2; this release reads version 1"),
        ({"nncf": "removed"}, "is not complete"),
    ],
)
def test_descriptions_that_are_wrong(saved, entries, message):
    change(saved, **entries)
    with pytest.raises(TableFormatError, match=message):
        load_quantized(TinyDenoiser(), saved)


def test_files_that_are_broken(saved):
    (saved / "quantization.json").write_text("{")
    with pytest.raises(TableFormatError, match="not readable JSON"):
        load_quantized(TinyDenoiser(), saved)
    with pytest.raises(TableFormatError, match="not readable JSON"):
        load_quantized(TinyDenoiser(), saved / "missing")


def test_tensors_that_are_broken(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TableFormatError, match="not a readable safetensors file"):
        load_quantized(TinyDenoiser(), saved)


def test_another_architecture_or_bank(make, saved, tmp_path):
    class Wider(TinyDenoiser):
        def __init__(self):
            super().__init__()
            self.extra = torch.nn.Linear(2, 2)

    wider = Wider()
    with pytest.raises(TableMismatchError, match=r"another architecture than this Wider.*missing"):
        load_quantized(wider, saved)
    narrow = TinyDenoiser().eval()
    with pytest.raises(TimestepError, match="no argument 'sigma'"):
        load_quantized(narrow, saved, timestep_argument="sigma")
    assert not any(is_wrapped(model) for model in (wider, narrow))
    save_quantized(make(), tmp_path / "live")
    with pytest.raises(TableMismatchError, match="another bank than ConstantBank"):
        load_quantized(TinyDenoiser(), tmp_path / "live", bank=tdq.ConstantBank)


def test_model_that_is_not_attached(quantized, tmp_path):
    with pytest.raises(AdapterError, match=r"Call tdq_plugin\.attach\(model\) first"):
        save_quantized(quantized(), tmp_path / "model")
