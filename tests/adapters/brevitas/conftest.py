"""Brevitas layers inside a model that takes a timestep."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from contract.networks import BATCHES, TinyDenoiser
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import quantize_layerwise


class Around(nn.Module):
    """A layer, called with the sample alone."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, sample: Tensor, timestep: Tensor | float) -> Tensor:
        return self.layer(sample)


@pytest.fixture
def around() -> Callable[[nn.Module], nn.Module]:
    """`around(layer)`: a model to attach."""
    return Around


@pytest.fixture
def calibrated() -> Callable[..., nn.Module]:
    """`calibrated(**options of quantize_layerwise)`: the tiny denoiser in evaluation mode."""

    def build(**options):
        return copy.deepcopy(_calibrated(**options))

    return build


@cache
def _calibrated(**options):
    torch.manual_seed(0)
    model = tdq.attach(quantize_layerwise(TinyDenoiser().eval(), **options))
    tdq.calibrate(model, BATCHES)
    return model.eval()
