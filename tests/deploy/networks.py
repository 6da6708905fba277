"""Frozen graphs for the tests of integer execution."""

import copy
from functools import cache

import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from torch import nn
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping

__all__ = ["SAMPLE", "LabelledDenoiser", "WithEncoder", "frozen", "prepared"]

SAMPLE = BATCHES[2][0][:4]


class LabelledDenoiser(nn.Module):
    """The class label joins the timestep's embedding, so only a part of the path is t alone."""

    def __init__(self) -> None:
        super().__init__()
        self.label_embedding = nn.Embedding(5, 8)
        self.time_embedding = nn.Linear(2, 8)
        self.conv_in = nn.Conv2d(1, 8, 3, padding=1, padding_mode="circular")
        self.conv_out = nn.Conv2d(8, 1, 3, padding="same", groups=1)

    def forward(self, sample, timestep, label):
        angle = timestep.expand(sample.shape[0]).reshape(-1, 1) / torch.tensor([1000.0, 200.0])
        embedding = self.time_embedding(angle.sin()).tanh() + self.label_embedding(label)
        return self.conv_out(self.conv_in(sample) * embedding[:, :, None, None])


class WithEncoder(nn.Module):
    """torch.fx does not look into `TransformerEncoderLayer`, which holds linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, sample, timestep):
        hidden = self.first(sample[:, 0]) * (1 + timestep / 1000).reshape(-1, 1, 1)
        return self.last(self.encoder(hidden))[:, None]


def prepared(model=None, qat=True, bits=8, mapping=None, example=None, timestep_argument=None):
    """A prepared graph of a model with seeded weights."""
    torch.manual_seed(0)
    example = example or example_inputs()
    graph = tdq.trace(model or TinyDenoiser(), example, timestep_argument=timestep_argument)
    graph.train(qat)
    mapping = mapping or tdq_qconfig_mapping(graph, bits, bits, first_last_bits=None)
    prepare = prepare_qat_fx if qat else prepare_fx
    return prepare(graph, mapping, example, backend_config=tdq_backend_config()).eval()


def frozen(lookup="exact", batches=BATCHES, steps=STEPS, **options):
    """A calibrated graph with a table."""
    model = tdq.attach(prepared(**options))
    tdq.calibrate(model, batches)
    return tdq.freeze(model, steps, lookup)


@cache
def _tiny(lookup, qat, bits):
    return frozen(lookup, qat=qat, bits=bits)


def frozen_tiny(lookup="exact", qat=True, bits=8):
    """`frozen` for the `TinyDenoiser`, calibrated once."""
    return copy.deepcopy(_tiny(lookup, qat, bits))
