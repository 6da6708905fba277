"""Scales that travel by hooks, where a model is not called as a whole or not as it was."""

import functools

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import quantize_eager
from tdq_plugin.errors import (
    AdapterError,
    CalibrationError,
    TableMismatchError,
    TimestepError,
)
from tdq_plugin.grid import activation_grid
from tdq_plugin.hooks import argument_names, at_timestep

SAMPLE = BATCHES[2][0][:4]


@pytest.fixture
def model():
    torch.manual_seed(0)
    attached = tdq.attach(quantize_eager(TinyDenoiser().eval(), 4, 8), tdq.LearnedTableBank)
    tdq.calibrate(attached, BATCHES)
    return attached


@pytest.mark.parametrize("timestep", [600, torch.tensor(STEPS[:4])])
def test_a_part_at_a_timestep(model, timestep):
    seen = []
    handle = model.conv_in.register_forward_hook(lambda *call: seen.append(call[2]))
    model(SAMPLE, timestep)
    handle.remove()
    with at_timestep(model, timestep):
        assert torch.equal(model.conv_in(SAMPLE), seen[0])
    with pytest.raises(TimestepError, match=r"a part of it runs within tdq_plugin\.hooks\.at_tim"):
        model.conv_in(SAMPLE)


def test_a_timestep_for_a_model_without_hooks():
    with pytest.raises(AdapterError, match="has no scale hooks"), at_timestep(nn.Linear(1, 1), 5):
        pass


class LabelFirst(TinyDenoiser):
    def forward(self, label, sample, timestep):
        return super().forward(sample, timestep) * label


def test_the_sample_need_not_be_the_first_argument():
    attached = tdq.attach(quantize_eager(LabelFirst().eval()))
    assert argument_names(attached) == ("sample", "timestep")
    assert argument_names(attached, {"label"}) == ("sample", "timestep")
    with pytest.raises(AdapterError, match="none is left for the sample"):
        argument_names(attached, {"label", "sample"})


def test_a_forward_that_a_tool_has_replaced(model):
    expected = model(SAMPLE, 250)
    original = model.forward

    def forward(*args, **kwargs):
        return original(*args, **kwargs)

    model.forward = forward
    assert torch.equal(model(SAMPLE, 250), expected)
    assert torch.equal(model(sample=SAMPLE, timestep=250), expected)
    with pytest.raises(TimestepError, match="without its timestep argument"):
        model(SAMPLE)
    model.forward = functools.partial(original, timestep=250)
    with pytest.raises(TimestepError, match="without its timestep argument"):
        model(SAMPLE)


def test_scales_that_are_missing_matter_to_whoever_wants_one():
    model = tdq.attach(quantize_eager(TinyDenoiser().eval()))
    with pytest.raises(CalibrationError, match=r"Run tdq_plugin\.calibrate"):
        model(SAMPLE, 250)
    with pytest.raises(CalibrationError, match=r"Run tdq_plugin\.calibrate"):
        model(SAMPLE, 250)
    for _, quantizer in tdq.named_quantizers(model):
        quantizer._forward_pre_hooks.clear()
        quantizer.mode = "off"
    assert model(SAMPLE, 250).isfinite().all()


class StepDenoiser(TinyDenoiser):
    """Its timestep has a name of its own."""

    def forward(self, sample, step):
        return super().forward(sample, step)


class Wrapper(nn.Module):
    """A model with a denoiser as its part."""

    def __init__(self):
        super().__init__()
        self.denoiser = TinyDenoiser()

    def forward(self, sample, timestep):
        return self.denoiser(sample, timestep)


def test_a_model_and_a_part_of_it_are_not_both_attached():
    whole = quantize_eager(Wrapper().eval())
    tdq.attach(whole.denoiser)
    with pytest.raises(AdapterError, match=r"part 'denoiser' of this Wrapper is attached already"):
        tdq.attach(whole)
    tdq.calibrate(whole.denoiser, BATCHES)
    assert whole(SAMPLE, 250).isfinite().all()
    whole = tdq.attach(quantize_eager(Wrapper().eval()))
    with pytest.raises(AdapterError, match=r"'conv_in.input' is 'denoiser.conv_in.input' of"):
        tdq.attach(whole.denoiser)
    tdq.calibrate(whole, BATCHES)
    assert whole(SAMPLE, 250).isfinite().all()


def test_attach_again_after_it_was_refused():
    model = quantize_eager(StepDenoiser().eval())
    with pytest.raises(TimestepError, match=r"timestep_argument='\.\.\.'"):
        tdq.attach(model)
    attached = tdq.attach(model, tdq.ConstantBank, timestep_argument="step")
    tdq.calibrate(attached, BATCHES)
    assert attached(SAMPLE, 250).isfinite().all()


class Recursive(TinyDenoiser):
    """Calls itself, at another timestep and for fewer samples, before its own layers are done."""

    def forward(self, sample, timestep, depth=1):
        first = self.conv_in(sample)
        if depth:
            inner = self(sample[:2] * 0.5, 600, depth - 1)
            sample = sample + inner.mean()
        return super().forward(sample, timestep) + first.mean()


def test_a_model_that_calls_itself():
    torch.manual_seed(0)
    model = tdq.attach(quantize_eager(Recursive().eval(), 4, 8), tdq.LearnedTableBank)
    observed = tdq.calibrate(model, [(SAMPLE, 250)])["conv_in.input"]
    assert observed.timesteps.tolist() == [250.0, 600.0]
    assert observed.limits[0, 0] <= SAMPLE.min() < observed.limits[1, 0] == SAMPLE[:2].min() / 2
    with torch.no_grad():
        inner = model(SAMPLE[:2] * 0.5, 600, 0)
        with at_timestep(model, 250):
            first = model.conv_in(SAMPLE).mean()
            expected = TinyDenoiser.forward(model, SAMPLE + inner.mean(), 250) + first
        assert torch.equal(model(SAMPLE, 250), expected)
        assert not torch.equal(model(SAMPLE, 600), expected)
        with pytest.raises(TimestepError, match="outside of a call"):
            model.conv_in(SAMPLE)


def test_after_an_inner_call_that_failed_the_outer_goes_on(model):
    class Tolerant(TinyDenoiser):
        def forward(self, sample, timestep):
            with pytest.raises(TimestepError, match="without its timestep"):
                self(sample)
            return super().forward(sample, timestep)

    tolerant = tdq.attach(quantize_eager(Tolerant().eval(), 4, 8), tdq.LearnedTableBank)
    tolerant.load_state_dict(model.state_dict())
    assert torch.equal(tolerant(SAMPLE, 250), model(SAMPLE, 250))


@pytest.mark.parametrize("change", ["order", "grids"])
def test_a_bank_with_other_rows_is_no_exchange(model, change):
    bank = model.scale_bank
    grids = dict(zip(bank.names, bank.grids, strict=True))
    if change == "order":
        grids = dict(reversed(grids.items()))
    else:
        grids["conv_in.input"] = activation_grid(3)
    with pytest.raises(TableMismatchError, match=r"Row 0 of the new bank is .* in their order"):
        tdq.set_scale_bank(model, tdq.ConstantBank(grids))
    assert model.scale_bank is bank


def test_calibration_forgets_a_call_that_failed(model):
    def fail(*_):
        raise ZeroDivisionError

    with tdq.calibration(model) as observers, torch.no_grad():
        handle = model.conv_out.register_forward_pre_hook(fail)
        with pytest.raises(ZeroDivisionError):
            model(SAMPLE * 1000, 900)
        handle.remove()
        model(SAMPLE, 250)
    seen = observers["conv_in.input"].result()
    assert seen.timesteps.tolist() == [250.0]
    assert seen.limits.tolist() == [[SAMPLE.min().item(), SAMPLE.max().item()]]
