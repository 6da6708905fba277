"""The whole flow on the architecture of google/ddpm-cifar10-32, with random weights."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers_models import ddpm_cifar10
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping

pytestmark = pytest.mark.whole


def test_prepare_attach_qat_step_freeze_and_int8():
    unet = ddpm_cifar10()
    example = (torch.randn(2, 3, 32, 32), torch.tensor([20, 800]))
    graph = tdq.trace(unet, example)
    mapping = tdq_qconfig_mapping(graph, activation_bits=8, weight_bits=8)
    model = prepare_qat_fx(graph.train(), mapping, example, backend_config=tdq_backend_config())
    tdq.attach(model)
    tdq.calibrate(model, [example], samples=64, warm_start=False)

    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = {name: value.detach().clone() for name, value in model.scale_bank.named_parameters()}
    model(*example).square().mean().backward()
    optimizer.step()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert not torch.equal(model.scale_bank.biases[-1], before["biases.3"])

    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    tdq.freeze(model.eval(), scheduler)
    int8 = tdq.lower_to_int8(model)
    timesteps = scheduler.timesteps[:2]
    with torch.no_grad():
        fake, integer = (m(example[0], timesteps) for m in (model, int8))
    assert (integer - fake).norm() < 0.2 * fake.norm()
