"""Fixtures: a small model, prepared by every adapter."""

import copy
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from contract.adapters import ADAPTERS, AdapterUnderTest
from contract.networks import BATCHES, TinyDenoiser, example_inputs
from torch import nn

import tdq_plugin as tdq

Make = Callable[..., nn.Module]


@pytest.fixture(params=ADAPTERS, ids=lambda adapter: adapter.name)
def adapter(request: pytest.FixtureRequest) -> AdapterUnderTest:
    """Each adapter; one whose framework lacks what the test is marked to need is left out."""
    lacks = getattr(request.param, "lacks", {})
    for needed in request.node.iter_markers("needs"):
        if needed.args[0] in lacks:
            pytest.skip(lacks[needed.args[0]])
    return request.param


@pytest.fixture
def make(adapter: AdapterUnderTest) -> Make:
    """`make(bank, activations, weights, attention)`: an attached, calibrated model in eval mode."""

    def build(
        bank: type = tdq.GeneratorBank,
        activations: int = 4,
        weights: int = 8,
        attention: bool = True,
    ) -> nn.Module:
        return copy.deepcopy(_calibrated(adapter, bank, activations, weights, attention))

    return build


@pytest.fixture
def attach_only(adapter: AdapterUnderTest) -> Make:
    """As `make`, but not calibrated."""
    return partial(_attached, adapter)


def _attached(
    adapter: AdapterUnderTest,
    bank: type = tdq.GeneratorBank,
    activations: int = 4,
    weights: int = 8,
    attention: bool = True,
) -> nn.Module:
    torch.manual_seed(0)
    model = TinyDenoiser(attention).eval()
    prepared = adapter.prepare(model, example_inputs(), activations, weights)
    return tdq.attach(prepared, bank).eval()


@cache
def _calibrated(adapter, bank, activations, weights, attention):
    model = _attached(adapter, bank, activations, weights, attention)
    tdq.calibrate(model, BATCHES)
    return model
