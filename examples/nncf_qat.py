"""Quantization-aware training with NNCF and TDQ: the digits DDIM, on OpenVINO's int8 kernels.

Run it by `python examples/nncf_qat.py`; arguments are the numbers of training steps, of sampling
steps and of the activations' bits, 4 or 8. The learning rates are for 4 bits; 8 need little
training. What it learned is kept in `runs/nncf-qat`, and a second run goes on from there.
"""

import copy
import logging
import sys
from pathlib import Path

import nncf
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn.functional import mse_loss

import tdq_plugin as tdq
from tdq_plugin.adapters.nncf import (
    load_quantized,
    prepare,
    save_quantized,
    strip,
    tdq_quantize_settings,
)
from tdq_plugin.deploy.openvino import OVDenoiser, to_openvino
from tdq_plugin.recipes.ddim_digits_qat import MODEL
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.study.figures import sample_grid

Denoiser = UNet2DModel | OVDenoiser


def main(
    steps: int = 200,
    sampling_steps: int = 20,
    activation_bits: int = 4,
    results: Path = Path("runs/nncf-qat"),
) -> dict[str, float]:
    """Train, convert and sample; return the errors before and after, in torch and on OpenVINO."""
    torch.manual_seed(0)
    # At INFO, NNCF names every operation that stays float.
    nncf.set_log_level(logging.WARNING)
    teacher = UNet2DModel.from_pretrained(MODEL, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(MODEL, subfolder="scheduler")
    scheduler.set_timesteps(sampling_steps)
    digits, _ = load_digits()
    training, test = digits[:-64], digits[-64:]

    checkpoint = results / f"quantized-A{activation_bits}"
    if checkpoint.exists():
        model = load_quantized(copy.deepcopy(teacher), checkpoint)
    else:
        model = quantized(teacher, scheduler, training, activation_bits)
    errors = {}
    for state in ("before", "after"):
        if state == "after":
            train(model, teacher, scheduler, training, steps)
        frozen, on_openvino = deploy(model, scheduler)
        for engine, denoiser in (("torch", frozen), ("OpenVINO", on_openvino)):
            errors[f"{engine}, {state}"] = error(denoiser, teacher, scheduler, test)
    for name, value in errors.items():
        print(f"mean squared error of the noise, {name} training: {value:.6f}")

    save_quantized(model, checkpoint)
    on_openvino.save(results / "openvino")
    models = {"float32": teacher, "TDQ in torch": frozen, "TDQ on OpenVINO": on_openvino}
    grid = {name: draw(denoiser, scheduler) for name, denoiser in models.items()}
    (results / "samples.png").write_bytes(sample_grid(grid, columns=8))
    return errors


def quantized(
    teacher: UNet2DModel, scheduler: DDIMScheduler, digits: Tensor, activation_bits: int
) -> UNet2DModel:
    """NNCF's quantizers, one scale bank for all of them, and ranges for every timestep."""
    batches = [
        (noisy(scheduler, digits[:32], timestep.expand(32)), timestep.expand(32))
        for timestep in scheduler.timesteps
    ]
    dataset = nncf.Dataset(batches)
    model = nncf.quantize(teacher, dataset, subset_size=len(batches), **tdq_quantize_settings())
    prepare(model, batches[0], activation_bits, weight_bits=8)
    tdq.attach(model).eval()
    tdq.calibrate(model, batches)
    return model


def train(
    model: UNet2DModel, teacher: UNet2DModel, scheduler: DDIMScheduler, digits: Tensor, steps: int
) -> None:
    """Bring the model's output to the teacher's; weights, their ranges and generators learn."""
    optimizer = torch.optim.AdamW(parameter_groups(model))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    model.train()
    for step in range(steps):
        images = digits[torch.randint(len(digits), (32,))]
        # Each sample has a timestep of its own, and so a scale of its own in every layer.
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (32,))
        x = noisy(scheduler, images, timesteps)
        with torch.no_grad():
            target = teacher(x, timesteps).sample
        loss = mse_loss(model(x, timesteps).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.6f}")
    model.eval()


def parameter_groups(model: UNet2DModel) -> list[dict[str, object]]:
    """The generators learn faster than the weights and their ranges."""
    bank = [value for name, value in model.named_parameters() if name.startswith("scale_bank.")]
    rest = [value for name, value in model.named_parameters() if not name.startswith("scale_bank.")]
    return [{"params": bank, "lr": 1e-3}, {"params": rest, "lr": 1e-4}]


def deploy(model: UNet2DModel, scheduler: DDIMScheduler) -> tuple[UNet2DModel, OVDenoiser]:
    """A copy whose generators became a table, and the same on OpenVINO."""
    frozen = tdq.freeze(copy.deepcopy(model), scheduler)
    example = torch.zeros(2, 1, 16, 16), scheduler.timesteps[:1]
    return frozen, OVDenoiser(to_openvino(strip(frozen), example), model.config)


def noisy(
    scheduler: DDIMScheduler,
    images: Tensor,
    timesteps: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Images as the diffusion process has them at some timesteps."""
    return scheduler.add_noise(images, torch.randn(images.shape, generator=generator), timesteps)


@torch.no_grad()
def error(
    denoiser: Denoiser, teacher: UNet2DModel, scheduler: DDIMScheduler, digits: Tensor
) -> float:
    """Mean squared difference of the two over the sampler's timesteps; the same in every call."""
    generator = torch.Generator().manual_seed(1)
    errors = []
    # At t = 0 the error is far larger and matters least: hardly any noise is left to remove.
    for timestep in scheduler.timesteps[:-1]:
        x = noisy(scheduler, digits, timestep.expand(len(digits)), generator)
        errors.append(mse_loss(denoiser(x, timestep).sample, teacher(x, timestep).sample))
    return float(torch.stack(errors).mean())


@torch.no_grad()
def draw(denoiser: Denoiser, scheduler: DDIMScheduler) -> Tensor:
    """Eight images, from the same noise in every call."""
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        x = scheduler.step(denoiser(x, timestep).sample, timestep, x).prev_sample
    return x.clamp(-1, 1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
