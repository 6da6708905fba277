"""DDPM's loss, and pictures of what a network draws that was trained with it."""

from typing import Literal

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor
from torch.nn.functional import mse_loss

from tdq_plugin.recipes.evaluation.sampling import sample, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.study.figures import sample_grid

__all__ = ["BetaSchedule", "noise_loss", "picture_of_samples"]

# As diffusers names them: DDPM's, and the cosine of improved DDPM (arXiv 2102.09672, section 3.2).
BetaSchedule = Literal["linear", "squaredcos_cap_v2"]


def noise_loss(
    unet: UNet2DModel, scheduler: DDIMScheduler, clean: Tensor, generator: torch.Generator
) -> Tensor:
    """DDPM's loss (Ho et al., arXiv 2006.11239, eq. 14) of clean samples `(B, C, H, W)`."""
    noise = torch.randn(clean.shape, generator=generator)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(clean),), generator=generator)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    return mse_loss(unet(noisy, timesteps, return_dict=False)[0], noise)


def picture_of_samples(model: FloatModel, steps: int, seed: int) -> bytes:
    """64 samples of a trained model as a PNG."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(64, *model.latent_shape, generator=generator)
    scheduler = scheduler_with(model.scheduler, steps)
    images = sample(model.denoise, scheduler, noise, decode=model.decode)
    rows = {
        f"samples {16 * row + 1} to {16 * row + 16}": images[16 * row :][:16] for row in range(4)
    }
    return sample_grid(rows, columns=16)
