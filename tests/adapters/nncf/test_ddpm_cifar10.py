"""The whole flow on the architecture of google/ddpm-cifar10-32, with random weights."""

import nncf
import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_models import ddpm_cifar10

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings

pytestmark = pytest.mark.whole


def test_quantize_attach_qat_step_freeze_and_strip():
    unet = ddpm_cifar10().eval()
    example = (torch.randn(2, 3, 32, 32), torch.tensor([20, 800]))
    model = nncf.quantize(unet, nncf.Dataset([example]), **tdq_quantize_settings())
    tdq.attach(prepare(model, example))
    assert len(tdq.scale_bank(model).names) == 77

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: value.detach().clone() for name, value in model.scale_bank.named_parameters()}
    model.train()(*example).sample.square().mean().backward()
    optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not torch.equal(model.scale_bank.biases[-1], before["biases.3"])

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    tdq.freeze(model.eval(), scheduler)
    timestep = scheduler.timesteps[0]
    with torch.no_grad():
        fake, plain = model(example[0], timestep).sample, strip(model)(example[0], timestep)
    assert (plain - fake).norm() < 0.2 * fake.norm()
