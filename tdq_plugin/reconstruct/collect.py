"""Calibration data from the sampler's own trajectories, balanced over timesteps."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tdq_plugin.errors import CalibrationError, ConfigError
from tdq_plugin.evaluation_mode import evaluation_mode
from tdq_plugin.model_output import first_tensor
from tdq_plugin.options import check_option

__all__ = [
    "CalibrationSet",
    "TimestepDistribution",
    "collect_trajectories",
    "normal_weight",
    "samples_per_step",
]

TimestepDistribution = Literal["uniform", "normal"]


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Inputs of a denoiser.

    Attributes:
        samples: Noisy images or latents, shape `(N, C, H, W)`.
        timesteps: Shape `(N,)`.
        conditions: Further inputs by their names, such as `encoder_hidden_states`, each `(N, ...)`.
    """

    samples: Tensor
    timesteps: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.timesteps)

    def batches(self, batch_size: int) -> Iterator[tuple[Any, ...]]:
        """Consecutive batches as `calibrate` takes them: `(samples, timesteps)`, and conditions."""
        for start in range(0, len(self), batch_size):
            rows = slice(start, start + batch_size)
            conditions = {name: value[rows] for name, value in self.conditions.items()}
            batch = self.samples[rows], self.timesteps[rows]
            yield (*batch, conditions) if conditions else batch


@torch.no_grad()
def collect_trajectories(
    model: Callable[..., Any],
    scheduler: Any,
    sample_shape: tuple[int, ...],
    images: int = 256,
    distribution: TimestepDistribution = "uniform",
    byte_budget: int = 2**30,
    batch_size: int = 64,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    conditions: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> CalibrationSet:
    """Sample images and keep what the model saw on the way (PTQ4DM, arXiv 2211.15736, 4.2).

    Args:
        model: Called as `model(samples, timestep, **conditions)`; returns the predicted noise, or a
            tuple or output object that starts with it. A module runs in evaluation mode.
        scheduler: A diffusers scheduler with its timesteps set; it stays as it is.
        sample_shape: Shape of one sample, `(C, H, W)`.
        images: Trajectories; 256 of them with 20 steps are PTQ4DM's 5,120 samples.
        distribution: `uniform` keeps every step of every trajectory. `normal` keeps more of the
            steps around 40 % of the trajectory, counted from the image, as PTQ4DM does.
        byte_budget: Largest size of samples and conditions; fewer of each step are kept if need be.
        batch_size: Images sampled together.
        seed: Seed of the initial noise and of the choice.
        progress: Called with the number of finished and of all model calls.
        conditions: Further inputs of the model by name, a row for each image: `(images, ...)`.
        device: Where the model is. The noise does not depend on it.

    Returns:
        The samples, grouped by timestep, on that device.

    Raises:
        CalibrationError: The budget does not hold one sample per timestep.
        ConfigError: There is no such distribution, a condition has another number of rows, or there
            is no image.
    """
    steps = list(scheduler.timesteps)
    conditions = {name: value.to(device) for name, value in (conditions or {}).items()}
    _check_images(images, conditions)
    row_bytes = _row_bytes(sample_shape, conditions)
    counts = samples_per_step(len(steps), images, distribution, row_bytes, byte_budget)
    starts, wanted = _draws(images, sample_shape, batch_size, counts, seed)
    kept = [torch.empty(count, *sample_shape, device=device) for count in counts]
    with evaluation_mode(model):
        for batch, start in enumerate(starts):
            # A sampler may count its steps and remember earlier ones: each batch has its own.
            sampler = copy.deepcopy(scheduler)
            samples = start.to(device) * float(sampler.init_noise_sigma)
            own = slice(batch * batch_size, batch * batch_size + len(start))
            conditioned = {name: value[own] for name, value in conditions.items()}
            for index, timestep in enumerate(steps):
                seen = sampler.scale_model_input(samples, timestep)
                row = wanted[index] - batch * batch_size
                inside = (row >= 0) & (row < len(seen))
                kept[index][inside] = seen[row[inside]]
                noise = first_tensor(model(seen, timestep, **conditioned))
                samples = sampler.step(noise, timestep, samples).prev_sample
                if progress is not None:
                    progress(batch * len(steps) + index + 1, len(starts) * len(steps))
    timesteps = [torch.full((len(c),), float(t)) for c, t in zip(kept, steps, strict=True)]
    chosen = torch.cat(wanted)
    return CalibrationSet(
        torch.cat(kept),
        torch.cat(timesteps).to(device),
        {name: value[chosen.to(device)] for name, value in conditions.items()},
    )


def _row_bytes(sample_shape: tuple[int, ...], conditions: Mapping[str, Tensor]) -> int:
    conditioned = sum(value[0].numel() * value.element_size() for value in conditions.values())
    return 4 * torch.Size(sample_shape).numel() + conditioned


def _draws(
    images: int, sample_shape: tuple[int, ...], batch_size: int, counts: list[int], seed: int
) -> tuple[list[Tensor], list[Tensor]]:
    """The noise that each batch starts from, and the images that are kept of each step."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(batch_size, images - start) for start in range(0, images, batch_size)]
    starts = [torch.randn(size, *sample_shape, generator=generator) for size in sizes]
    # Chosen beforehand, so that no more than the budget is ever held.
    return starts, [torch.randperm(images, generator=generator)[:count] for count in counts]


def _check_images(images: int, conditions: Mapping[str, Tensor]) -> None:
    if images < 1:
        raise ConfigError(f"images = {images}: give 1 or more.")
    for name, value in conditions.items():
        if len(value) != images:
            raise ConfigError(
                f"The condition {name!r} has {len(value)} rows for {images} images. Give one row "
                "for each, or set images."
            )


def normal_weight(from_image: Tensor) -> Tensor:
    """How often PTQ4DM draws a step (arXiv 2211.15736, 4.2), relative to the one drawn most.

    Args:
        from_image: Place in the trajectory, 0 at the image and 1 at pure noise, of any shape.
    """
    return torch.exp(-0.5 * ((from_image - 0.4) / 0.25).square())


def samples_per_step(
    steps: int,
    images: int,
    distribution: TimestepDistribution,
    row_bytes: int,
    byte_budget: int,
) -> list[int]:
    """How many samples `collect_trajectories` keeps at each step, pure noise first.

    Args:
        steps: Steps of the sampler.
        images: Trajectories.
        distribution: As for `collect_trajectories`.
        row_bytes: Size of a sample with its conditions.
        byte_budget: For all of them.

    Raises:
        CalibrationError: The budget does not hold one sample per timestep.
        ConfigError: There is no such distribution.

    Example:
        >>> samples_per_step(3, 256, "uniform", 3 * 32 * 32 * 4, byte_budget=2**20)
        [28, 28, 28]
    """
    check_option("distribution", distribution, get_args(TimestepDistribution))
    affordable = byte_budget // row_bytes
    if affordable < steps:
        raise CalibrationError(
            f"A budget of {byte_budget} bytes holds {affordable} samples, fewer than the {steps} "
            "timesteps. Raise byte_budget or take fewer steps."
        )
    if distribution == "uniform":
        return [min(images, affordable // steps)] * steps
    weight = normal_weight(torch.linspace(1, 0, steps))
    total = min(affordable, images * weight.sum().item() / weight.max().item())
    counts = (weight / weight.sum() * total).round().clamp(min=1, max=images).int()
    while counts.sum() > affordable:
        # What rounding up and the least of one have added.
        counts[counts.argmax()] -= 1
    return counts.tolist()
