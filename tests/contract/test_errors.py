"""Law 6: what is wrong raises, says what and what to do, and leaves the model as it was."""

from contextlib import contextmanager

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, TokensFirst, example_inputs

import tdq_plugin as tdq
from tdq_plugin.errors import (
    AdapterError,
    CalibrationError,
    LookupRuleError,
    ScaleError,
    TableMismatchError,
    TimestepError,
)

SAMPLE = BATCHES[2][0][:4]


@contextmanager
def raises_and_leaves(model, error, match):
    """The block raises, and the model computes the same before and after."""
    with torch.no_grad():
        before = model(SAMPLE, 250)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=match), torch.no_grad():
        yield
    with torch.no_grad():
        assert torch.equal(model(SAMPLE, 250), before)
    after = model.state_dict()
    assert state.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in state.items())


def test_call_without_timestep(make):
    model = make()
    with raises_and_leaves(model, (TimestepError, TypeError), "timestep"):
        model(SAMPLE)
    with raises_and_leaves(model, TimestepError, "timestep"):
        model(SAMPLE, None)


def test_timestep_that_is_none_of_the_forms(make):
    model = make()
    with raises_and_leaves(model, TimestepError, "not finite"):
        model(SAMPLE, float("nan"))
    with raises_and_leaves(model, TimestepError, r"shape \(\) or \(B,\), not \(4, 1\)"):
        model(SAMPLE, torch.zeros(4, 1))


def test_samples_along_another_dimension(adapter):
    timesteps = torch.tensor([10, 300, 600, 990])
    model = tdq.attach(adapter.prepare(TokensFirst().eval(), example_inputs(), 8, 8))
    # Where all samples have one timestep, they have one scale.
    tdq.calibrate(model, [(torch.randn(4, 1, 8, 8), step) for step in timesteps])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CalibrationError, match=r"'middle.input' does not hold the 4 samples"):
        tdq.calibrate(model, [(torch.randn(4, 1, 8, 8), timesteps)])
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def test_timestep_outside_the_table(make):
    model = tdq.freeze(make(), STEPS)
    with raises_and_leaves(model, LookupRuleError, "Timestep 3 is not in the frozen table"):
        model(SAMPLE, 3)
    with raises_and_leaves(model, LookupRuleError, "1200"):
        model(SAMPLE, torch.tensor([0, 100, 250, 1200]))


def test_number_of_timesteps_that_does_not_fit_the_batch(make):
    model = make()
    with raises_and_leaves(model, (ScaleError, RuntimeError), "3"):
        model(SAMPLE, torch.tensor([0, 100, 250]))


@pytest.mark.needs("calibration")
def test_call_before_calibration(attach_only):
    with pytest.raises(CalibrationError, match=r"Run tdq_plugin\.calibrate"):
        attach_only()(SAMPLE, 250)


def test_activations_that_are_not_finite(make):
    model = make()
    broken = SAMPLE.clone()
    broken[1, 0, 0, 0] = torch.nan
    with raises_and_leaves(model, CalibrationError, r"conv_in\.input.*NaN"):
        tdq.calibrate(model, [(broken, torch.tensor(STEPS[:4]))])


def test_calibration_without_data_or_beyond_the_process(make):
    model = make()
    with raises_and_leaves(model, CalibrationError, r"^There are no batches\. Give a list of them"):
        tdq.calibrate(model, [])
    bare = model, CalibrationError, r"^A batch is a Tensor\. Give the calibration a list"
    with raises_and_leaves(*bare):
        tdq.calibrate(model, (SAMPLE, torch.tensor(10)))
    with raises_and_leaves(model, CalibrationError, r"not within 0 \.\. 1000"):
        tdq.calibrate(model, [(SAMPLE, 1000)])


def test_timesteps_that_are_fractions(make):
    model = make()
    fractions = [(SAMPLE, torch.tensor([0.1, 0.4, 0.6, 0.9]))]
    with raises_and_leaves(model, CalibrationError, r"between 0 and 1.*num_timesteps=2"):
        tdq.calibrate(model, fractions)
    tdq.calibrate(make(tdq.ConstantBank), fractions)
    tdq.calibrate(model, fractions, num_timesteps=2)


def test_scale_that_is_not_finite(make):
    model = make()
    scales = torch.ones(len(tdq.scale_bank(model).names))
    scales[1] = torch.nan
    name = tdq.scale_bank(model).names[1]
    with raises_and_leaves(model, ScaleError, f"{name}.*nan"):
        tdq.scale_bank(model).set_static(scales, torch.zeros_like(scales))


def test_table_of_other_layers(make):
    model, table = make(), tdq.scale_bank(tdq.freeze(make(), STEPS)).table
    grids = {name.replace("conv_out", "other"): grid for name, grid in table.grids.items()}
    other = tdq.ScaleTable(grids, table.timesteps, table.scales, table.zero_points)
    with raises_and_leaves(model, TableMismatchError, r"conv_out\.input.*other\.input"):
        tdq.load_scales(model, other)


def test_table_of_other_bits(make):
    model, table = make(activations=4), tdq.scale_bank(tdq.freeze(make(activations=8), STEPS)).table
    with raises_and_leaves(model, TableMismatchError, "Prepare the model with the bits"):
        tdq.load_scales(model, table)


def test_attach_and_freeze_only_once(make):
    model = make()
    with raises_and_leaves(model, AdapterError, "scale bank already"):
        tdq.attach(model)
    tdq.freeze(model, STEPS)
    with raises_and_leaves(model, AdapterError, "frozen already"):
        tdq.freeze(model, STEPS)
    with raises_and_leaves(model, AdapterError, "cannot be calibrated"):
        tdq.calibrate(model, BATCHES)


def test_timesteps_to_freeze_that_are_none(make):
    model = make()
    with raises_and_leaves(model, TimestepError, "neither a count"):
        tdq.freeze(model, [])


def test_prepared_model_that_is_not_attached(adapter):
    model = adapter.prepare(TinyDenoiser().eval(), example_inputs(), 8, 8)
    with pytest.raises(AdapterError, match=r"Call tdq_plugin\.attach\(model\)"):
        model(SAMPLE, 250)
    with pytest.raises(AdapterError, match=r"Call tdq_plugin\.attach\(model\) first"):
        tdq.freeze(model, STEPS)
