"""Fit an output correction: what a quantized denoiser's samples lack on average, step by step."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdq_plugin.errors import CalibrationError
from tdq_plugin.output_correction import OutputCorrection

__all__ = ["fit_output_correction"]


@torch.no_grad()
def fit_output_correction(
    model: Callable[[Tensor, Tensor], Tensor],
    reference: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    noise: Tensor,
    batch_size: int = 200,
    progress: Callable[[int, int], None] | None = None,
) -> OutputCorrection:
    """Fit offsets that give the model's samples the reference's mean image after every step.

    Both sample from the same noise. Errors of a quantized model add up along its own trajectory,
    which a correction fitted on the reference's trajectory (as PTQD, arXiv 2305.10657, fits the
    mean of the quantization noise) does not see. Each pixel's mean is reduced by the share of its
    square that N samples give by chance: late steps, where a small shift of the sample is a large
    one of the noise, are hardly touched.

    Args:
        model: The quantized denoiser.
        reference: The float denoiser.
        scheduler: A diffusers scheduler of single steps whose timesteps are set, deterministic
            and without clipping, such as `DDIMScheduler(clip_sample=False)`.
        noise: Starting noise, shape `(N, C, H, W)`; 1,024 samples and more find small shifts.
        batch_size: Samples in one call of the models.
        progress: Called with the number of finished and of all steps.

    Raises:
        CalibrationError: There are fewer than two samples, or the scheduler's step is not linear
            in the predicted noise.
    """
    if len(noise) < 2:
        raise CalibrationError(
            f"{len(noise)} samples do not tell a shift from chance. Give 2 or more, better 1,024."
        )
    # A copy, for a scheduler that is refused may have counted its calls.
    tried = copy.deepcopy(scheduler)
    slopes = [_slope(tried, t, noise) for t in scheduler.timesteps]
    ours, theirs = noise, noise
    offsets = []
    for step, (timestep, slope) in enumerate(zip(scheduler.timesteps, slopes, strict=True)):
        ours = _advance(model, scheduler, timestep, ours, batch_size)
        theirs = _advance(reference, scheduler, timestep, theirs, batch_size)
        # In half precision, the square of a mean vanishes, and the mean with it.
        shift = _shrunken_mean(theirs.float() - ours.float())
        ours = (ours + shift).to(noise.dtype)
        offsets.append(shift / slope)
        if progress is not None:
            progress(step + 1, len(slopes))
    return OutputCorrection(scheduler.timesteps.float().flip(0), torch.stack(offsets).flip(0))


def _advance(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    scheduler: Any,
    timestep: Tensor,
    samples: Tensor,
    batch_size: int,
) -> Tensor:
    following = [
        scheduler.step(denoiser(part, timestep), timestep, part).prev_sample
        for part in samples.split(batch_size)
    ]
    return torch.cat(following)


def _shrunken_mean(differences: Tensor) -> Tensor:
    """Mean over samples; each pixel's is reduced by the share of its square that is chance."""
    mean = differences.mean(0)
    chance = differences.var(0) / len(differences)
    return mean * (1 - chance / mean.square().clamp(min=1e-30)).clamp(min=0)


def _slope(scheduler: Any, timestep: Tensor, noise: Tensor) -> float:
    """How much the next sample moves when the predicted noise grows by one."""
    zero = torch.zeros_like(noise[:1], dtype=torch.float32)
    try:
        reached = [
            float(scheduler.step(zero + value, timestep, zero).prev_sample.mean())
            for value in (0.0, 1.0, 2.0)
        ]
    except IndexError:
        # It counts its calls, and these are more than a sampler makes.
        reached = [math.nan] * 3
    first, second = reached[1] - reached[0], reached[2] - reached[1]
    # NaN is not linear, either.
    if first == 0 or not abs(second - first) <= 1e-3 * abs(first):
        raise CalibrationError(
            f"At t = {float(timestep):g}, the step of {type(scheduler).__name__} is not linear in "
            "the predicted noise. Set clip_sample=False and thresholding=False; samplers that "
            "remember earlier steps cannot be corrected."
        )
    return first
