"""The whole flow on the architecture of google/ddpm-cifar10-32, with random weights."""

import nncf
import torch
from diffusers import DDIMScheduler, UNet2DModel

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import prepare, strip, tdq_quantize_settings


def test_quantize_attach_qat_step_freeze_and_strip():
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ).eval()
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
