"""Models from NNCF's adapter on OpenVINO."""

import copy
import logging
import warnings
from functools import cache

import nncf
import openvino as ov
import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from cpu import needs_vnni
from deploy.networks import SAMPLE
from deploy.test_layers import relative_error

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings
from tdq_plugin.deploy.openvino import load_openvino, save_openvino, to_openvino
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES, integer_layers
from tdq_plugin.errors import LookupRuleError, TimestepError

nncf.set_log_level(logging.ERROR)


@cache
def quantized(symmetric):
    torch.manual_seed(0)
    settings = tdq_quantize_settings(symmetric_activations=symmetric)
    return nncf.quantize(TinyDenoiser().eval(), nncf.Dataset(BATCHES), **settings)


def stripped(activations, weights, symmetric):
    model = copy.deepcopy(quantized(symmetric))
    prepare(model, example_inputs(), activations, weights)
    tdq.calibrate(tdq.attach(model), BATCHES)
    return strip(tdq.freeze(model, STEPS))


@cache
def static_layers():
    """The integer layers of NNCF's own static model."""
    with warnings.catch_warnings():
        # OpenVINO traces the model; torch deprecates its tracer, which warns of each constant.
        warnings.simplefilter("ignore")
        model = ov.convert_model(
            copy.deepcopy(quantized(False)), example_input=(SAMPLE, torch.zeros(1))
        )
    return integer_layers(model, DEFAULT_PROPERTIES)


@needs_vnni
@pytest.mark.parametrize(
    ("bits", "symmetric"), [((8, 8), False), ((8, 8), True), ((4, 4), False), ((3, 8), True)]
)
def test_every_layer_runs_on_integers(bits, symmetric, tmp_path):
    module = stripped(*bits, symmetric)
    model = to_openvino(module, example_inputs())
    ours = {name.removeprefix("model.") for name in model.report.integer_layers}
    assert ours >= static_layers()
    assert len(ours) == 6
    assert model.report.lost_layers == []
    assert set(model.report.moved) < set(model.report.readers_left) <= set(model.bank.names)
    for step in STEPS:
        with torch.no_grad():
            theirs, wrong = (module(SAMPLE, t) for t in (step, STEPS[STEPS.index(step) - 2]))
        assert relative_error(model(SAMPLE, step), theirs) < 0.2 * relative_error(wrong, theirs)
    save_openvino(model, tmp_path / "model")
    assert torch.equal(load_openvino(tmp_path / "model")(SAMPLE, 250), model(SAMPLE, 250))
    with pytest.raises(LookupRuleError, match="Timestep 3 is not in the frozen table"):
        model(SAMPLE, 3)
    with pytest.raises(TimestepError, match="one timestep a call"):
        model(SAMPLE, torch.tensor(STEPS[:4]))
