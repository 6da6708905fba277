"""Models from NNCF's adapter on OpenVINO."""

import logging
from functools import cache

import nncf
import openvino as ov
import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from deploy.networks import SAMPLE
from deploy.test_layers import relative_error

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings
from tdq_plugin.deploy.openvino import load_openvino, save_openvino, to_openvino
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES, integer_layers
from tdq_plugin.errors import LookupRuleError, TimestepError

nncf.set_log_level(logging.ERROR)

# OpenVINO traces NNCF's own model in the test; the tracer warns of its constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


def quantized(**settings):
    torch.manual_seed(0)
    settings = tdq_quantize_settings(**settings)
    return nncf.quantize(TinyDenoiser().eval(), nncf.Dataset(BATCHES), **settings)


def stripped(activations, weights, **settings):
    model = prepare(quantized(**settings), example_inputs(), activations, weights)
    tdq.calibrate(tdq.attach(model), BATCHES)
    return strip(tdq.freeze(model, STEPS))


@cache
def static_layers():
    """The integer layers of NNCF's own static model."""
    model = ov.convert_model(quantized(), example_input=(SAMPLE, torch.zeros(1)))
    return integer_layers(model, DEFAULT_PROPERTIES)


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (3, 8)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_layer_runs_on_integers(bits, symmetric, tmp_path):
    module = stripped(*bits, symmetric_activations=symmetric)
    model = to_openvino(module, example_inputs())
    ours = {name.removeprefix("model.") for name in model.report.integer_layers}
    assert ours >= static_layers()
    assert len(ours) == 6
    assert model.report.lost_layers == []
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
