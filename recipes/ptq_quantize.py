"""Give a prepared model the scales of each method of the PTQ recipe."""

from collections.abc import Callable
from pathlib import Path

from diffusers import DDIMScheduler
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.calibrate import initialise_scales
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.ptq_methods import Method
from tdq_plugin.recipes.sampling import Denoiser
from tdq_plugin.reconstruct import CalibrationSet, Progress, ReconstructionConfig, reconstruct
from tdq_plugin.scales import TrainableBank

__all__ = ["apply_method", "sampler_weighting"]


def apply_method(
    model: nn.Module,
    reference: Denoiser,
    method: Method,
    observations: dict[str, Observation],
    data: CalibrationSet,
    config: ReconstructionConfig | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TrainableBank:
    """Give the model a bank of the method's kind, calibrated and trained; return the bank.

    Training brings the model's output to that of `reference`, the float model.
    """
    previous = tdq.scale_bank(model)
    bank = method.bank(dict(zip(previous.names, previous.grids, strict=True)))
    initialise_scales(bank, observations, method.ranges, method.warm_start)
    tdq.set_scale_bank(model, bank)
    for _, quantizer in tdq.named_quantizers(model):
        quantizer.mode = "dynamic" if method.dynamic else "quantize"
    if method.trained:
        reconstruct(model, data, config, weighting, checkpoint, progress, reference)
    return bank


def sampler_weighting(scheduler: DDIMScheduler) -> Callable[[Tensor], Tensor]:
    """Weight errors by the share of noise, sqrt(1 - alpha_t): at t = 0 noise hardly matters."""
    weights = (1 - scheduler.alphas_cumprod).sqrt()

    def weighting(timesteps: Tensor) -> Tensor:
        chosen: Tensor = weights[timesteps.round().long()]
        return chosen

    return weighting
