"""The digits DDIM through NNCF: its integer codes on OpenVINO, layer by layer.

End to end, one activation that float rounding moves to the next code moves others behind it. Here
every layer gets the inputs that it has in the fake-quantized model.
"""

import copy
import logging
from collections import Counter

import nncf
import numpy as np
import openvino as ov
import pytest
import torch
from contract.recording import recorded_calls
from cpu import needs_vnni
from openvino import opset13 as ops

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings
from tdq_plugin.deploy.openvino import to_openvino
from tdq_plugin.deploy.openvino.nodes import consumers, fake_quantizers
from tdq_plugin.deploy.openvino.precision import DEFAULT_PROPERTIES, integer_layers
from tdq_plugin.recipes.evaluation.sampling import record_trajectories, scheduler_with
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.ptq.config import MODEL

nncf.set_log_level(logging.ERROR)

STEPS = 5


@pytest.fixture(scope="module")
def trajectories():
    """Noisy images of the float model at each step of the sampler."""
    float_model = load_float_model(MODEL)
    noise = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    sampler = scheduler_with(float_model.scheduler, STEPS)
    recorded = record_trajectories(float_model.denoise, sampler, noise)
    return float_model.unet, [
        (x, t.expand(8)) for x, t in zip(recorded.inputs, recorded.timesteps, strict=True)
    ]


@pytest.fixture(scope="module")
def frozen(trajectories):
    unet, batches = trajectories
    settings = tdq_quantize_settings()
    model = nncf.quantize(copy.deepcopy(unet), nncf.Dataset(batches), **settings)
    # The first and last layer keep 8 bits: both grids are in the model.
    tdq.attach(prepare(model, batches[0], activation_bits=4, weight_bits=8)).eval()
    tdq.calibrate(model, batches)
    return tdq.freeze(model, [float(t[0]) for _, t in batches])


def with_layers_apart(model, shapes):
    """A copy that takes the values of all quantizers, and returns what it makes of them itself."""
    model = model.clone()
    model.reshape({"sample": shapes["conv_in.input"], "timestep": [1]})
    given, found = [], []
    for quantizer in list(fake_quantizers(model)):
        name = quantizer.get_friendly_name()
        value = ops.parameter(shapes[name], np.float32, name=name)
        value.set_friendly_name(name)
        value.output(0).get_tensor().set_names({name})
        # Behind a quantizer, layers keep their integer kernels.
        levels = quantizer.get_attributes()["levels"]
        again = ops.fake_quantize(value, *quantizer.input_values()[1:], levels)
        for reader in consumers(quantizer.output(0)):
            reader.replace_source_output(again.output(0))
        given.append(value)
        found.append(quantizer.output(0))
    (result,) = model.get_results()
    outputs = [*found, result.input_value(0)]
    names = [value.get_friendly_name() for value in given]
    return ov.Model(outputs, [*model.get_parameters(), *given]), names


@needs_vnni
def test_codes_are_those_of_the_fake_quantized_model(trajectories, frozen):
    """At most one code apart, on at most 1e-4 of the values."""
    _, batches = trajectories
    stripped = strip(frozen)
    converted = to_openvino(stripped, batches[0])
    with torch.no_grad(), recorded_calls(frozen) as calls:
        frozen(*batches[0])
    shapes = {name: list(call.x.shape) for name, call in calls.items()}
    apart, names = with_layers_apart(converted.model, shapes)
    rows = [stripped.bank.names.index(name) for name in names]
    assert sorted(rows) == list(range(len(stripped.bank.names)))
    assert integer_layers(apart, DEFAULT_PROPERTIES) == set(converted.report.integer_layers)
    run = ov.Core().compile_model(apart, "CPU", DEFAULT_PROPERTIES)

    distances, wrong_distances = Counter(), Counter()
    # The sampler's timesteps fall, those of the table rise.
    table = stripped.ratios.flip(0)[:, rows]
    for (sample, timesteps), ratios in zip(batches, table, strict=True):
        with torch.no_grad(), recorded_calls(frozen) as calls:
            expected = frozen(sample, timesteps[:1]).sample
        ordered = [calls[name] for name in names]
        quantized = [call.output / ratio for call, ratio in zip(ordered, ratios, strict=True)]
        inputs = [sample, timesteps[:1].float(), *quantized]
        *values, output = run(inputs).to_tuple()
        torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-4, atol=1e-4)
        distances += distances_in_codes(values, ordered, ratios)
        inputs[1] = batches[0 if timesteps[0] < 500 else -1][1][:1].float()
        *values, _ = run(inputs).to_tuple()
        wrong_distances += distances_in_codes(values, ordered, ratios)
    count = distances.total()
    assert distances.keys() <= {0, 1}
    assert distances[1] < 1e-4 * count
    assert wrong_distances[0] < 0.9 * count


def distances_in_codes(values, calls, ratios):
    """How many values are so many codes away from those of the recorded calls."""
    counts = Counter()
    for value, call, ratio in zip(values, calls, ratios, strict=True):
        difference = torch.from_numpy(value) * ratio - call.output
        distances, sizes = (difference / call.scale).round().abs().unique(return_counts=True)
        counts.update(dict(zip(distances.int().tolist(), sizes.tolist(), strict=True)))
    return counts
