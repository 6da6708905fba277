"""Quantization-aware training with Brevitas and TDQ: the digits DDIM at 4 bits, in a minute.

Run it by `python examples/brevitas_qat.py`; arguments are the numbers of training and of sampling
steps. What it learned is kept in `runs/brevitas-qat`, and a second run goes on from there.
"""

import copy
import sys
from pathlib import Path

import torch
from brevitas.export.inference import quant_inference_mode
from brevitas.graph.calibrate import calibration_mode
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn.functional import mse_loss

import tdq_plugin as tdq
from tdq_plugin.adapters.brevitas import export_onnx, quantize_layerwise
from tdq_plugin.recipes.ddim_digits_qat import MODEL
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.study.figures import sample_grid


def main(
    steps: int = 60, sampling_steps: int = 20, results: Path = Path("runs/brevitas-qat")
) -> tuple[float, float]:
    """Train, sample and export; return the error before and after."""
    torch.manual_seed(0)
    results.mkdir(parents=True, exist_ok=True)
    teacher = UNet2DModel.from_pretrained(MODEL, subfolder="unet").eval()
    scheduler = DDIMScheduler.from_pretrained(MODEL, subfolder="scheduler")
    scheduler.set_timesteps(sampling_steps)
    digits, _ = load_digits()
    training, test = digits[:-16], digits[-16:]

    model = quantized(teacher, scheduler, training)
    before = error(model, teacher, scheduler, test)
    train(model, teacher, scheduler, training, steps, results / "model.pt")
    # The generators become a table, one row for each timestep of the sampler.
    tdq.freeze(model.eval(), scheduler)
    after = error(model, teacher, scheduler, test)
    print(f"mean squared error of the noise: {before:.4f} calibrated, {after:.4f} trained")

    grid = {"float32": draw(teacher, scheduler)}
    with quant_inference_mode(model, cache_quant_weight=True):
        grid["TDQ, W4A4"] = draw(model, scheduler)
    (results / "samples.png").write_bytes(sample_grid(grid, columns=8))
    export_onnx(model, results / "model.onnx", (test[:2], scheduler.timesteps[0]))
    return before, after


def quantized(teacher: UNet2DModel, scheduler: DDIMScheduler, digits: Tensor) -> UNet2DModel:
    """Brevitas layers instead of float ones, one scale bank for all, and Brevitas' calibration."""
    model = quantize_layerwise(copy.deepcopy(teacher), activation_bits=4, weight_bits=4)
    tdq.attach(model).eval()
    with calibration_mode(model), torch.no_grad():
        for timestep in scheduler.timesteps:
            model(noisy(scheduler, digits[:16], timestep.expand(16)), timestep)
    return model


def train(
    model: UNet2DModel,
    teacher: UNet2DModel,
    scheduler: DDIMScheduler,
    digits: Tensor,
    steps: int,
    checkpoint: Path,
) -> None:
    """Bring the model's output to the teacher's; weights and scale generators learn."""
    if checkpoint.exists():
        model.load_state_dict(torch.load(checkpoint, weights_only=True))
    # Brevitas rebuilds its quantizers in load_state_dict, with new parameters: optimizers come
    # after it.
    optimizer = torch.optim.AdamW(parameter_groups(model))
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
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    torch.save(model.state_dict(), checkpoint)


def parameter_groups(model: UNet2DModel) -> list[dict[str, object]]:
    """The generators learn faster than the weights and their scales."""
    bank = [value for name, value in model.named_parameters() if name.startswith("scale_bank.")]
    rest = [value for name, value in model.named_parameters() if not name.startswith("scale_bank.")]
    return [{"params": bank, "lr": 1e-3}, {"params": rest, "lr": 1e-5}]


def noisy(scheduler: DDIMScheduler, images: Tensor, timesteps: Tensor) -> Tensor:
    """Images as the diffusion process has them at some timesteps."""
    return scheduler.add_noise(images, torch.randn_like(images), timesteps)


@torch.no_grad()
def error(
    model: UNet2DModel, teacher: UNet2DModel, scheduler: DDIMScheduler, digits: Tensor
) -> float:
    """Mean squared difference of the two models over the sampler's timesteps."""
    errors = []
    for timestep in scheduler.timesteps:
        x = noisy(scheduler, digits, timestep.expand(len(digits)))
        errors.append(mse_loss(model(x, timestep).sample, teacher(x, timestep).sample))
    return float(torch.stack(errors).mean())


@torch.no_grad()
def draw(model: UNet2DModel, scheduler: DDIMScheduler) -> Tensor:
    """Eight images, from the same noise in every call."""
    x = torch.randn(8, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    for timestep in scheduler.timesteps:
        x = scheduler.step(model(x, timestep).sample, timestep, x).prev_sample
    return x.clamp(-1, 1)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
