"""Models prepared by torch.ao for the tests of its adapter."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from diffusers_models import tiny_unet
from torch import fx, nn
from torch.ao.quantization.quantize_fx import prepare_fx, prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping

Prepare = Callable[..., fx.GraphModule]


@pytest.fixture
def prepare() -> Prepare:
    """`prepare(model, example_inputs, activations, weights, qat=..., **mapping options)`."""
    return _prepare


@pytest.fixture
def frozen() -> Prepare:
    """As `prepare`, on the tiny denoiser: attached, calibrated and frozen, in evaluation mode."""

    def build(activations=8, weights=8, **options):
        return copy.deepcopy(_frozen(activations, weights, **options))

    return build


def _prepare(model, inputs, activations=8, weights=8, qat=True, **options):
    graph = tdq.trace(model.eval(), inputs).train(qat)
    mapping = tdq_qconfig_mapping(graph, activations, weights, **options)
    framework = prepare_qat_fx if qat else prepare_fx
    return framework(graph, mapping, inputs, backend_config=tdq_backend_config())


@cache
def _frozen(activations, weights, **options):
    torch.manual_seed(0)
    model = _prepare(TinyDenoiser(), example_inputs(), activations, weights, **options)
    tdq.calibrate(tdq.attach(model), BATCHES)
    return tdq.freeze(model.eval(), STEPS)


@pytest.fixture(scope="session")
def unet() -> nn.Module:
    """A real UNet of diffusers with 41 quantizable layers and attention."""
    return tiny_unet().eval()


@pytest.fixture
def unet_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(2, 1, 8, 8), torch.tensor([10, 20])
