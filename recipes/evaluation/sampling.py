"""Sampling with a denoiser and a diffusers scheduler, and the float model's trajectories."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor

from tdq_plugin.errors import ConfigError

__all__ = [
    "Denoiser",
    "Trajectories",
    "image_shape",
    "offset_of",
    "record_trajectories",
    "sample",
    "scheduler_with",
]

Denoiser = Callable[[Tensor, Any], Tensor]


@dataclass(frozen=True)
class Trajectories:
    """What a denoiser saw and said at S steps, for N images.

    Attributes:
        timesteps: Shape `(S,)`, falling.
        inputs: Noisy images, shape `(S, N, C, H, W)`.
        noise: Predicted noise, same shape.
        outputs: Images after the scheduler's step, same shape.
    """

    timesteps: Tensor
    inputs: Tensor
    noise: Tensor
    outputs: Tensor


def image_shape(model: UNet2DModel) -> tuple[int, int, int]:
    """Channels, height and width of the images that a model denoises."""
    return model.config.in_channels, model.config.sample_size, model.config.sample_size


def offset_of(scheduler: DDIMScheduler, steps: int, shift: float) -> int:
    """By how many timesteps a sampler is later that is `shift` of the distance of its steps later.

    Example:
        >>> offset_of(DDIMScheduler(), 20, 0.5)
        25
    """
    return int(shift * scheduler.config.num_train_timesteps / steps)


def scheduler_with(scheduler: DDIMScheduler, steps: int, offset: int = 0) -> DDIMScheduler:
    """A copy of the scheduler with `steps` timesteps, each `offset` later than usual.

    Raises:
        ConfigError: Its diffusion process has fewer.
    """
    most = scheduler.config.num_train_timesteps
    if steps > most:
        raise ConfigError(
            f"The sampler cannot have steps = {steps}: the model's diffusion process has {most} "
            f"timesteps. Set steps (evaluation.steps in full-size recipes) to {most} or less."
        )
    later = scheduler.config.steps_offset + offset
    copy = DDIMScheduler.from_config(scheduler.config, steps_offset=later)
    copy.set_timesteps(steps)
    return copy


@torch.no_grad()
def sample(
    denoiser: Denoiser,
    scheduler: DDIMScheduler,
    noise: Tensor,
    batch_size: int = 100,
    advance: Callable[[int], Any] | None = None,
    decode: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Draw images in [-1, 1] from given noise, shape `(N, C, H, W)`.

    Args:
        denoiser: Predicts the noise.
        scheduler: The sampler, its timesteps set.
        noise: What sampling starts from.
        batch_size: Images drawn together.
        advance: Told of finished images.
        decode: From what the denoiser sees to images, where the two differ.
    """
    images = []
    for start in noise.split(batch_size):
        current = start
        for timestep in scheduler.timesteps:
            current = scheduler.step(denoiser(current, timestep), timestep, current).prev_sample
        images.append((decode(current) if decode else current).clamp(-1, 1))
        if advance is not None:
            advance(len(start))
    return torch.cat(images)


@torch.no_grad()
def record_trajectories(
    denoiser: Denoiser,
    scheduler: DDIMScheduler,
    noise: Tensor,
    advance: Callable[[], Any] | None = None,
) -> Trajectories:
    """Sample and keep every step; `advance` is called after each."""
    inputs, predicted, outputs = [], [], []
    current = noise
    for timestep in scheduler.timesteps:
        inputs.append(current)
        predicted.append(denoiser(current, timestep))
        current = scheduler.step(predicted[-1], timestep, current).prev_sample
        outputs.append(current)
        if advance is not None:
            advance()
    stacked = (torch.stack(values) for values in (inputs, predicted, outputs))
    return Trajectories(scheduler.timesteps.clone(), *stacked)
