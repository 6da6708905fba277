"""Models quantized by NNCF for the tests of its adapter."""

import copy
import logging
from collections.abc import Callable
from functools import cache

import nncf
import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import prepare, tdq_quantize_settings

Make = Callable[..., nn.Module]

nncf.set_log_level(logging.ERROR)


@pytest.fixture
def quantized() -> Make:
    """`quantized(**settings)`: the tiny denoiser, as `nncf.quantize` returns it."""

    def build(**settings):
        return copy.deepcopy(_quantized(**settings))

    return build


@pytest.fixture
def make(quantized) -> Make:
    """`make(activations, weights)`: prepared, attached and calibrated."""

    def build(activations=8, weights=8, **settings):
        return copy.deepcopy(_calibrated(activations, weights, **settings))

    return build


@pytest.fixture
def frozen(make) -> Make:
    """As `make`, and frozen."""

    def build(activations=8, weights=8, **settings):
        return tdq.freeze(make(activations, weights, **settings), STEPS)

    return build


@cache
def _quantized(**settings):
    torch.manual_seed(0)
    dataset = nncf.Dataset(BATCHES)
    return nncf.quantize(TinyDenoiser().eval(), dataset, **tdq_quantize_settings(**settings))


@cache
def _calibrated(activations, weights, **settings):
    model = copy.deepcopy(_quantized(**settings))
    tdq.attach(prepare(model, example_inputs(), activations, weights))
    tdq.calibrate(model, BATCHES)
    return model
