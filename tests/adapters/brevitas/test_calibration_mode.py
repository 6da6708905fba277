"""Brevitas' `calibration_mode` sets the model's scale bank."""

import copy

import pytest
import torch
from brevitas.graph.calibrate import calibration_mode
from contract.networks import BATCHES, STEPS, TinyDenoiser

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import quantize_layerwise
from tdq_plugin.errors import AdapterError, CalibrationError

SAMPLE = BATCHES[2][0][:4]


def attached(bank=None):
    torch.manual_seed(0)
    return tdq.attach(quantize_layerwise(TinyDenoiser().eval(), activation_bits=4), bank)


@pytest.fixture
def model():
    return attached(tdq.ConstantBank)


def calibrate(model, batches=BATCHES):
    with torch.no_grad(), calibration_mode(model):
        for batch in batches:
            model(*batch)


def test_same_scales_as_calibrate_gives():
    # Brevitas also switches weight quantization off while it calibrates.
    ours, theirs = attached(), attached()
    for each in (ours, theirs):
        for module in each.modules():
            if hasattr(module, "weight_quant"):
                module.weight_quant.disable_quant = True
    calibrate(ours)
    tdq.calibrate(theirs, BATCHES)
    state = tdq.scale_bank(theirs).state_dict()
    for name, value in tdq.scale_bank(ours).state_dict().items():
        assert torch.equal(value, state[name]), name


def test_the_block_is_float_and_leaves_modes_as_they_were(model):
    torch.manual_seed(0)
    expected = TinyDenoiser().eval()(SAMPLE, 250)
    bank = tdq.scale_bank(model)
    with torch.no_grad(), calibration_mode(model):
        assert torch.equal(model(SAMPLE, 250), expected)
    assert tdq.scale_bank(model) is bank
    assert not model.training
    for _, quantizer in tdq.named_quantizers(model):
        assert quantizer.mode == "quantize"
        assert not quantizer.observed
    assert not torch.equal(model(SAMPLE, 250), expected)


def test_scales_follow_the_timestep_from_the_start():
    model = attached(tdq.LearnedTableBank)
    calibrate(model)
    scales, _ = tdq.scale_bank(model).rows(torch.tensor([0.0, 999.0]))
    assert (scales[:, 0] / scales[:, 1] - 1).abs().max() > 0.2


def test_a_copy_calibrates_itself(model):
    twin = copy.deepcopy(model)
    calibrate(twin)
    assert twin(SAMPLE, 250).isfinite().all()
    with pytest.raises(CalibrationError, match=r"Run tdq_plugin\.calibrate"):
        model(SAMPLE, 250)


def test_again_after_training(model):
    calibrate(model)
    first = tdq.scale_bank(model).base_scale.clone()
    calibrate(model, [(sample * 2, timesteps) for sample, timesteps in BATCHES])
    assert (tdq.scale_bank(model).base_scale > first).any()


def test_a_mode_that_is_not_enabled_changes_nothing(model):
    calibrate(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad(), calibration_mode(model, enabled=False):
        model(SAMPLE * 5, 250)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_no_data(model):
    with pytest.raises(CalibrationError, match="saw no calibration data"), calibration_mode(model):
        pass
    assert all(quantizer.mode == "quantize" for _, quantizer in tdq.named_quantizers(model))


@pytest.mark.parametrize("calls", [0, 1])
def test_an_error_in_the_block_comes_through(model, calls):
    calibrate(model)
    before = copy.deepcopy(tdq.scale_bank(model).state_dict())

    def batches():
        yield from [(SAMPLE * 9, 250)] * calls
        raise ValueError("the user's")

    with pytest.raises(ValueError, match="the user's"):
        calibrate(model, batches())
    after = tdq.scale_bank(model).state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(quantizer.mode == "quantize" for _, quantizer in tdq.named_quantizers(model))


def test_an_error_that_is_handled_outside_of_the_block_does_not_matter(model):
    try:
        raise ValueError
    except ValueError:
        calibrate(model)
    assert model(SAMPLE, 250).isfinite().all()


def test_processes_of_another_length(model):
    batches = [(sample, timesteps * 3) for sample, timesteps in BATCHES]
    with pytest.raises(CalibrationError, match=r"\[1800.*not within 0 \.\. 1000\. Set num_"):
        calibrate(model, batches)
    model.tdq_calibration.num_timesteps = 3000
    calibrate(model, batches)
    assert model(SAMPLE, 2997).isfinite().all()


def test_a_frozen_model(model):
    calibrate(model)
    tdq.freeze(model, STEPS)
    before = model(SAMPLE, STEPS[1])
    with pytest.raises(AdapterError, match="cannot be calibrated"):
        calibrate(model)
    assert torch.equal(model(SAMPLE, STEPS[1]), before)


def test_a_part_of_the_model(model):
    calibrate(model)
    # The mode finds the layers of the part, and not what belongs to the whole model.
    with (
        torch.no_grad(),
        calibration_mode(model.conv_in),
        pytest.raises(AdapterError, match=r"'conv_in.input' was attached in. Run it on the whole"),
    ):
        model(SAMPLE, 250)
    assert model(SAMPLE, 250).isfinite().all()


def test_before_attach():
    model = quantize_layerwise(TinyDenoiser().eval())
    with pytest.raises(AdapterError, match=r"Call tdq_plugin\.attach"):
        calibrate(model)
