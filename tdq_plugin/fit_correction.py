"""Fit an output correction: what a quantized denoiser and its samples lack, step by step."""

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tdq_plugin.errors import CalibrationError
from tdq_plugin.evaluation_mode import evaluation_mode
from tdq_plugin.model_output import first_tensor
from tdq_plugin.output_correction import OutputCorrection, with_gains

__all__ = ["fit_output_correction"]


@torch.no_grad()
def fit_output_correction(
    model: Callable[[Tensor, Tensor], Any],
    reference: Callable[[Tensor, Tensor], Any],
    scheduler: Any,
    noise: Tensor,
    batch_size: int = 200,
    progress: Callable[[int, int], None] | None = None,
    explained: float = 0.95,
) -> OutputCorrection:
    """Fit gains that tell the reference's output near pure noise, and offsets of the samples' mean.

    Both sample from the same noise. Near pure noise the reference's output is a linear function of
    the sample, to within less than the rounding error of a quantized model: there gains of sample
    and output, by least squares on the reference's samples, take nearly all of the error away.
    Where they take less than the share `explained`, they would also shrink what the model knows
    about the image, and are left out. PTQD (arXiv 2305.10657, section 4) corrects the output alone,
    by the correlation of its error with itself.

    The offset gives the model's samples, corrected so far, the reference's mean image after every
    step, as errors add up along the model's own trajectory. Each pixel's mean is reduced by the
    share of its square that N samples give by chance: late steps, where a small shift of the sample
    is a large one of the noise, are hardly touched.

    Args:
        model: The quantized denoiser; returns the predicted noise, or a tuple or diffusers output
            that starts with it. A module runs in evaluation mode.
        reference: The float denoiser, of the same kind.
        scheduler: A diffusers scheduler of single steps whose timesteps are set, deterministic
            and without clipping, such as `DDIMScheduler(clip_sample=False)`.
        noise: Starting noise, shape `(N, C, H, W)`; 1,024 samples and more find small shifts.
        batch_size: Samples in one call of the models.
        progress: Called with the number of finished and of all steps.
        explained: Share of the mean squared error, from 0 to 1, that gains have to take away to be
            used at a timestep. With 1 there are none, and offsets do all.

    Raises:
        CalibrationError: There are fewer than two samples, `explained` is no share, or the
            scheduler's step is not linear in the predicted noise.
    """
    _check(noise, explained)
    # A copy, for a scheduler that is refused may have counted its calls.
    tried = copy.deepcopy(scheduler)
    slopes = [_slope(tried, t, noise) for t in scheduler.timesteps]
    ours, theirs = noise, noise
    rows, ones = [], torch.ones(noise.shape[1], device=noise.device)
    with evaluation_mode(model), evaluation_mode(reference):
        for step, (timestep, slope) in enumerate(zip(scheduler.timesteps, slopes, strict=True)):
            wanted = _predict(reference, theirs, timestep, batch_size)
            output_gain, sample_gain = ones, 0 * ones
            if explained < 1:
                found = _predict(model, theirs, timestep, batch_size)
                output_gain, sample_gain = _gains(found, theirs, wanted, explained)
            output = _predict(model, ours, timestep, batch_size)
            output = with_gains(output, ours, output_gain, sample_gain).to(noise.dtype)
            ours = scheduler.step(output, timestep, ours).prev_sample
            theirs = scheduler.step(wanted, timestep, theirs).prev_sample
            # In half precision, the square of a mean vanishes, and the mean with it.
            shift = _shrunken_mean(theirs.float() - ours.float())
            ours = (ours + shift).to(noise.dtype)
            rows.append((timestep.float(), output_gain, sample_gain, shift / slope))
            if progress is not None:
                progress(step + 1, len(slopes))
    columns = zip(*reversed(rows), strict=True)
    return OutputCorrection(*(torch.stack(column) for column in columns))


def _check(noise: Tensor, explained: float) -> None:
    if not 0 <= explained <= 1:
        raise CalibrationError(f"explained = {explained} is no share of an error: 0 to 1.")
    if len(noise) < 2:
        raise CalibrationError(
            f"{len(noise)} samples do not tell a shift from chance. Give 2 or more, better 1,024."
        )


def _predict(
    denoiser: Callable[[Tensor, Tensor], Any],
    samples: Tensor,
    timestep: Tensor,
    batch_size: int,
) -> Tensor:
    parts = samples.split(batch_size)
    return torch.cat([first_tensor(denoiser(part, timestep)) for part in parts])


def _gains(
    output: Tensor, sample: Tensor, wanted: Tensor, explained: float
) -> tuple[Tensor, Tensor]:
    """For each channel, the factors of output and sample that come nearest to what is wanted.

    They are 1 and 0 in channels whose error they explain too little of. Means are left to the
    offset.
    """
    known = torch.stack([_centred(output), _centred(sample)], dim=-1)
    missing = (_centred(wanted) - known[..., 0])[..., None]
    products = known.mT @ known
    # Output and sample are almost the same there: the ridge lets them share the correction.
    ridge = 1e-8 * products.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
    products = products + ridge[:, None, None] * torch.eye(2)
    change = torch.linalg.solve(products, known.mT @ missing)
    left = (missing - known @ change).square().sum(1)
    used = left < (1 - explained) * missing.square().sum(1)
    change = torch.where(used, change[..., 0], 0).float().to(output.device)
    return 1 + change[:, 0], change[:, 1]


def _centred(images: Tensor) -> Tensor:
    """Without the mean image, shape `(C, N * H * W)`, in float64, which not every device has."""
    images = images.cpu().double()
    return (images - images.mean(0)).transpose(0, 1).flatten(1)


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
