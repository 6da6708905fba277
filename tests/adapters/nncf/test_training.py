"""QAT and reconstruction of models quantized by NNCF."""

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser

import tdq_plugin as tdq
from tdq_plugin.errors import AdapterError
from tdq_plugin.reconstruct import CalibrationSet

SAMPLES = torch.cat([sample[:4] for sample, _ in BATCHES])
TIMESTEPS = torch.tensor(STEPS).repeat_interleave(4).float()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_qat_step_changes_everything_that_is_learned(make, bits):
    model = make(bits, bits).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model(SAMPLES[::4], torch.tensor(STEPS)).square().mean().backward()
    optimizer.step()
    unchanged = {n for n, value in model.named_parameters() if torch.equal(value, before[n])}
    fixed = {name for name, value in model.named_parameters() if not value.requires_grad}
    # NNCF keeps numbers of bits and signs as parameters of integers.
    assert all(name.endswith(("_num_bits", "signed_tensor")) for name in fixed)
    assert unchanged == fixed


def test_reconstruction_brings_the_output_nearer(make):
    model = make(3, 8)
    data = CalibrationSet(SAMPLES, TIMESTEPS)
    with torch.no_grad():
        for _, quantizer in tdq.named_quantizers(model):
            quantizer.mode = "off"
        target = model(SAMPLES, TIMESTEPS)
        for _, quantizer in tdq.named_quantizers(model):
            quantizer.mode = "quantize"
        before = (model(SAMPLES, TIMESTEPS) - target).square().mean()
    config = tdq.ReconstructionConfig(granularity="network", iterations=60, batch_size=8)
    tdq.reconstruct(model, data, config)
    with torch.no_grad():
        after = (model(SAMPLES, TIMESTEPS) - target).square().mean()
    assert after < 0.85 * before


def test_float_weights_come_before_the_ranges(make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AdapterError, match=r"'conv_in.weight' and no ranges.* before nncf\.quan"):
        model.load_state_dict(TinyDenoiser().state_dict(), strict=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    bank = {name: value for name, value in before.items() if name.startswith("scale_bank.")}
    model.load_state_dict(bank, strict=False)
    model.load_state_dict(before)
