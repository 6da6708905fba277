"""BREVITAS_JIT=1: TorchScript compiles Brevitas' modules around the quantizers."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, torch
import tdq_plugin as tdq
from torch import nn
from brevitas import config
from brevitas.quant import Int8WeightPerChannelFloat
from tdq_plugin.adapters.brevitas import quantize_layerwise, tdq_layer_map

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3)
    def forward(self, sample, timestep):
        return self.last(self.first(sample).relu())

def output():
    torch.manual_seed(0)
    model = quantize_layerwise(
        Net(), activation_bits=4, weight_bits=4, weight_quant=Int8WeightPerChannelFloat
    )
    tdq.attach(model)
    sample, timesteps = torch.randn(3, 1, 8, 8), torch.tensor([0, 4, 8])
    tdq.calibrate(model, [(sample * 2, timesteps)], num_timesteps=9)
    model.train()(sample, timesteps).square().sum().backward()
    gradient = tdq.scale_bank(model).biases[-1].grad.flatten().tolist()
    model.load_state_dict(model.state_dict())
    tdq.freeze(model.eval(), 9)
    return [model(sample, timesteps).flatten().tolist(), gradient]

def default_weights():
    try:
        tdq_layer_map()
    except tdq.TDQError as error:
        return str(error)

result = [bool(config.JIT_ENABLED), *output(), default_weights()]
"""


@pytest.mark.slow
def test_same_values_with_and_without():
    names = {}
    exec(CODE, names)
    without, values, gradient, refusal = names["result"]
    assert not without
    assert refusal is None
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", f"{CODE}\nprint(json.dumps(result))"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "BREVITAS_JIT": "1", "OMP_NUM_THREADS": "1"},
    )
    compiled, *theirs, refusal = json.loads(done.stdout.splitlines()[-1])
    assert compiled
    assert theirs[0] == values
    assert theirs[1] == pytest.approx(gradient, rel=1e-3)
    # TorchScript cannot compile the weights that are the default.
    assert refusal.startswith("BREVITAS_JIT is set")
