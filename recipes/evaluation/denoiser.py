"""How far a quantized denoiser is from the float one: along trajectories, and in its images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor
from torch.nn.functional import mse_loss

from tdq_plugin.recipes.evaluation.sampling import (
    Denoiser,
    Trajectories,
    record_trajectories,
    sample,
)
from tdq_plugin.study import FrechetReference, classifier_score

__all__ = ["Evaluator", "Result"]


@dataclass(frozen=True)
class Result:
    """What the evaluation of one method gives.

    Attributes:
        metrics: The numbers of its row in the report.
        timesteps: Timesteps of the sampler, falling.
        errors: Mean squared noise error at each of them.
        images: Drawn images in [-1, 1], shape `(N, C, H, W)`.
    """

    metrics: dict[str, float | None]
    timesteps: list[float]
    errors: list[float]
    images: Tensor


class Evaluator:
    """Holds the float model's trajectories and samples, which every method is compared with.

    Args:
        denoiser: The float model.
        scheduler: Its scheduler.
        unseen: The same with timesteps between those of the scheduler.
        noise: Starting noise of the samples, shape `(N, C, H, W)`.
        images: What the float model draws from it.
        other_images: As many images of the float model from other noise, for the noise floor.
        trajectory_noise: Starting noise of the trajectories.
        features: Feature network of the Fréchet distances.
        data: Real images.
        decode: From what the denoiser sees to images; None where these are the same. Errors along
            trajectories are measured before it, images after it.
        classify: Classifier whose logits `(N, K)` the samples are scored by; None for no score.
        advance: Called after each step of the two sets of trajectories, for a progress bar.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: DDIMScheduler,
        unseen: DDIMScheduler,
        noise: Tensor,
        images: Tensor,
        other_images: Tensor,
        trajectory_noise: Tensor,
        features: Callable[[Tensor], Tensor],
        data: Tensor,
        decode: Callable[[Tensor], Tensor] | None = None,
        classify: Callable[[Tensor], Tensor] | None = None,
        advance: Callable[[], Any] | None = None,
    ) -> None:
        self.scheduler, self.unseen, self.decode = scheduler, unseen, decode
        self.classify = classify
        self.noise, self.images, self.other_images = noise, images, other_images
        self.seen_trajectories = record_trajectories(denoiser, scheduler, trajectory_noise, advance)
        self.unseen_trajectories = record_trajectories(denoiser, unseen, trajectory_noise, advance)
        self.to_data = FrechetReference(features, data)
        self.to_float = FrechetReference(features, images)

    def noise_floor(self) -> dict[str, float]:
        """Distance between the float model's images and as many from other noise."""
        return {"frechet_distance_to_float": self.to_float.distance(self.other_images)}

    def float_metrics(self) -> dict[str, float | None]:
        """The float model's own row."""
        exact = dict.fromkeys(("trajectory_mse", "trajectory_mse_unseen", "t0_mse"), 0.0)
        return exact | {
            "step_mse": 0.0,
            "pixel_mse": 0.0,
            "frechet_distance": self.to_data.distance(self.images),
            "frechet_distance_to_float": None,
            "classifier_score": self._score(self.images),
        }

    @property
    def timesteps(self) -> list[float]:
        """All timesteps that an evaluation visits: freeze for these."""
        return [*self.scheduler.timesteps.tolist(), *self.unseen.timesteps.tolist()]

    def evaluate(
        self,
        denoiser: Denoiser,
        advance: Callable[[int], Any] | None = None,
        only_sampler: bool = False,
    ) -> Result:
        """Compare a denoiser with the float model.

        Args:
            denoiser: The quantized model.
            advance: Told of finished images.
            only_sampler: The denoiser knows the timesteps of the sampler alone.
        """
        errors, step_errors = _errors(denoiser, self.scheduler, self.seen_trajectories)
        images = sample(denoiser, self.scheduler, self.noise, advance=advance, decode=self.decode)
        ends_at_zero = int(self.scheduler.timesteps[-1]) == 0
        metrics: dict[str, float | None] = {
            "trajectory_mse": float(errors[:-1].mean() if ends_at_zero else errors.mean()),
            "trajectory_mse_unseen": None if only_sampler else self._unseen_error(denoiser),
            "t0_mse": float(errors[-1]) if ends_at_zero else None,
            "step_mse": float(step_errors.mean()),
            "pixel_mse": float(mse_loss(images, self.images)),
            "frechet_distance": self.to_data.distance(images),
            "frechet_distance_to_float": self.to_float.distance(images),
            "classifier_score": self._score(images),
        }
        timesteps = self.scheduler.timesteps.tolist()
        return Result(metrics, timesteps, errors.tolist(), images)

    def _unseen_error(self, denoiser: Denoiser) -> float:
        return float(_errors(denoiser, self.unseen, self.unseen_trajectories)[0].mean())

    @torch.no_grad()
    def _score(self, images: Tensor) -> float | None:
        if self.classify is None:
            return None
        return classifier_score(torch.cat([self.classify(part) for part in images.split(500)]))


@torch.no_grad()
def _errors(
    denoiser: Denoiser, scheduler: DDIMScheduler, reference: Trajectories
) -> tuple[Tensor, Tensor]:
    """Mean squared error of noise and of the next image at each step of the float trajectory."""
    noise_errors, step_errors = [], []
    for index, timestep in enumerate(reference.timesteps):
        noise = denoiser(reference.inputs[index], timestep)
        stepped = scheduler.step(noise, timestep, reference.inputs[index]).prev_sample
        noise_errors.append(mse_loss(noise, reference.noise[index]))
        step_errors.append(mse_loss(stepped, reference.outputs[index]))
    return torch.stack(noise_errors), torch.stack(step_errors)
