"""The whole flow on the architecture of google/ddpm-cifar10-32, with random weights."""

import pytest
import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.quant import Int8WeightPerChannelFloat
from diffusers import DDIMScheduler
from diffusers_models import ddpm_cifar10

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import quantize_layerwise, timestep_path_names

pytestmark = pytest.mark.whole


def test_layerwise_attach_qat_step_freeze_and_inference():
    unet = ddpm_cifar10()
    example = (torch.randn(2, 3, 32, 32), torch.tensor([20, 800]))
    assert len(timestep_path_names(unet)) == 24
    model = tdq.attach(quantize_layerwise(unet, weight_quant=Int8WeightPerChannelFloat))
    assert len(tdq.scale_bank(model).names) == 89
    tdq.calibrate(model, [example], samples=64, warm_start=False)

    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = tdq.scale_bank(model).biases[-1].detach().clone()
    model(*example).sample.square().mean().backward()
    optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert ((tdq.scale_bank(model).biases[-1] != before).flatten(1).any(dim=1)).all()

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    tdq.freeze(model.eval(), scheduler)
    timesteps = scheduler.timesteps[:2]
    with torch.no_grad():
        plain = model(example[0], timesteps).sample
        with quant_inference_mode(model):
            model(example[0], timesteps)
            assert torch.equal(model(example[0], timesteps).sample, plain)
