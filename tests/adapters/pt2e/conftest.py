"""Models prepared by torchao for the tests of its adapter."""

import copy
from collections.abc import Callable
from functools import cache

import pytest
import torch
from contract.networks import BATCHES, STEPS, TinyDenoiser, example_inputs
from diffusers_models import tiny_unet
from torch import Tensor, fx, nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e

import tdq_plugin as tdq
from tdq_plugin.adapters.pt2e import TDQQuantizer, export

Frozen = Callable[..., fx.GraphModule]


@pytest.fixture
def frozen() -> Frozen:
    """`frozen(activations, weights, qat=..., **quantizer options)`: the tiny denoiser."""

    def build(*bits, **options):
        return copy.deepcopy(_frozen(*bits, **options))

    return build


@cache
def _frozen(activations=8, weights=8, qat=True, **options):
    torch.manual_seed(0)
    exported = export(TinyDenoiser().eval(), example_inputs())
    framework = prepare_qat_pt2e if qat else prepare_pt2e
    model = framework(exported, TDQQuantizer(activations, weights, **options))
    tdq.calibrate(tdq.attach(model), BATCHES)
    return tdq.freeze(model.eval(), STEPS)


@pytest.fixture(scope="session")
def unet() -> nn.Module:
    """A real UNet of diffusers with attention."""
    return tiny_unet().eval()


@pytest.fixture
def unet_inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 1, 8, 8), torch.tensor([10, 20])


@pytest.fixture(scope="session")
def exported_unet(unet: nn.Module) -> fx.GraphModule:
    """Copy it before it is prepared."""
    return export(unet, (torch.zeros(2, 1, 8, 8), torch.tensor([10, 20])))
