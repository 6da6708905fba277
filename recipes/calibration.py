"""Calibration: the float model's trajectories, and what a quantized model sees on them."""

import math
from typing import Annotated

import torch
from diffusers import DDIMScheduler
from pydantic import Field, model_validator
from torch import nn
from tqdm.auto import tqdm

import tdq_plugin as tdq
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.config import Section
from tdq_plugin.recipes.evaluation.sampling import offset_of, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.reconstruct import CalibrationSet, TimestepDistribution, collect_trajectories
from tdq_plugin.reconstruct.collect import normal_weight

__all__ = [
    "CalibrationSection",
    "TrajectorySection",
    "collect",
    "observe",
    "placeholder",
    "pooled_as_ptq4dm",
    "thinned",
]

SEEDS_APART = 2**20
# Of timesteps, where the sampler has no more steps.
_BINS = 50


class TrajectorySection(Section):
    """Calibration data: `images` trajectories of the float model, within `byte_budget`."""

    images: int = Field(gt=0)
    byte_budget: int = Field(gt=0)

    def of_the_sampler(self) -> "CalibrationSection":
        """The same at every timestep of the sampler, and at no others."""
        return CalibrationSection(**self.model_dump(), shifts=[0], distribution="uniform")


class CalibrationSection(TrajectorySection):
    """Trajectories that may have other timesteps than the sampler's.

    The images are divided among `shifts`: by how much of the distance between two steps the
    timesteps of a trajectory are later than those of the sampler.
    """

    shifts: list[Annotated[float, Field(ge=0, lt=1)]] = Field(min_length=1)
    distribution: TimestepDistribution

    @model_validator(mode="after")
    def _enough_images(self) -> "CalibrationSection":
        if self.images < len(self.shifts):
            raise ValueError("fewer images than shifts")
        return self


def collect(
    section: CalibrationSection, model: FloatModel, steps: int, seed: int, batch_size: int = 64
) -> CalibrationSet:
    """Follow the float model's sampler.

    Args:
        section: How many trajectories, at which timesteps.
        model: The float model; the data end up on its device.
        steps: Of the DDIM sampler.
        seed: Of the noise.
        batch_size: Trajectories followed together.
    """
    groups = len(section.shifts)
    parts = []
    with tqdm(desc="calibration data", unit="call") as progress:
        for index, shift in enumerate(section.shifts):
            finished = progress.n

            def show(done: int, total: int, finished: int = finished) -> None:
                progress.total = groups * total
                progress.update(finished + done - progress.n)

            parts.append(
                collect_trajectories(
                    model.denoise,
                    scheduler_with(
                        model.scheduler, steps, offset_of(model.scheduler, steps, shift)
                    ),
                    model.latent_shape,
                    images=section.images // groups,
                    distribution=section.distribution,
                    byte_budget=section.byte_budget // groups,
                    batch_size=batch_size,
                    seed=seed + index * SEEDS_APART,
                    progress=show,
                )
            )
    device = model.unet.device
    return CalibrationSet(
        torch.cat([part.samples for part in parts]).to(device),
        torch.cat([part.timesteps for part in parts]).to(device),
    )


def placeholder(model: FloatModel) -> CalibrationSet:
    """Two samples of zeros, for what needs their shape and no more."""
    return CalibrationSet(torch.zeros(2, *model.latent_shape), torch.zeros(2))


def thinned(data: CalibrationSet, count: int) -> CalibrationSet:
    """About `count` of the points, from all timesteps alike, as points are grouped by timestep."""
    stride = max(1, len(data) // count)
    return CalibrationSet(data.samples[::stride], data.timesteps[::stride])


def pooled_as_ptq4dm(seen: Observation) -> Observation:
    """One bin for all timesteps, in which each counts as much as PTQ4DM draws it."""
    share = normal_weight(seen.timesteps / seen.timesteps.max())
    count = seen.values.shape[1]
    # A row is a uniform sample in random order, so that its beginning is one, too.
    chosen = torch.arange(count) < (share * count).round()[:, None]
    drawn = chosen.any(dim=1)
    values, limits = seen.values[chosen], seen.limits[drawn]
    return Observation(
        timesteps=(seen.timesteps * share).sum(0, keepdim=True) / share.sum(),
        limits=torch.stack([limits[:, 0].min(), limits[:, 1].max()])[None],
        deviation=values.std()[None],
        values=values[None],
    )


def observe(
    model: nn.Module,
    data: CalibrationSet,
    scheduler: DDIMScheduler,
    steps: int,
    batch_size: int = 128,
) -> dict[str, Observation]:
    """Watch the inputs of the quantizers while the model runs on the data, in float.

    Args:
        model: The attached model.
        data: What it sees.
        scheduler: The float model's.
        steps: Of the DDIM sampler; each has statistics of its own.
        batch_size: Samples in a call.
    """
    length = scheduler.config.num_train_timesteps
    bins = max(_BINS, math.ceil(length / (length // steps)))
    shown = tqdm(list(data.batches(batch_size)), desc="observe ranges", unit="batch")
    return tdq.calibrate(model, shown, warm_start=False, num_timesteps=length, bins=bins)
