"""Give a prepared model the scales of each method of the PTQ recipes."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import DDIMScheduler
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.calibrate import initialise_scales
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.calibration import pooled_as_ptq4dm
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.ptq.methods import METHODS, Method
from tdq_plugin.recipes.ptq.training import MethodTraining, train
from tdq_plugin.recipes.ptq.weights import set_weight_ranges
from tdq_plugin.reconstruct import CalibrationSet
from tdq_plugin.scales import TrainableBank

__all__ = ["Start", "apply_method", "quantize_method", "sampler_weighting"]


@dataclass(frozen=True)
class Start:
    """What every method starts from.

    Attributes:
        model: The float model.
        quantized: Its UNet with quantizers, attached.
        data: Calibration data.
        observations: What the quantizers saw on them.
    """

    model: FloatModel
    quantized: nn.Module
    data: CalibrationSet
    observations: dict[str, Observation]


def quantize_method(
    start: Start, name: str, training: MethodTraining | None, checkpoint: Path
) -> TrainableBank:
    """Give the model the scales of a method, trained if it is a method that is.

    Args:
        start: The model, its weights as every method starts from.
        name: One of `METHODS`.
        training: How it is trained.
        checkpoint: Where an interrupted training goes on from.

    Returns:
        The scale bank.
    """
    bank = apply_method(start.quantized, METHODS[name], start.observations)
    if training is not None:
        train(
            start.quantized,
            start.data,
            training.reconstruction,
            sampler_weighting(start.model.scheduler, training.weight_at_zero),
            checkpoint,
            title=METHODS[name].title,
            reference=start.model.unet,
        )
    return bank


def apply_method(
    model: nn.Module, method: Method, observations: dict[str, Observation]
) -> TrainableBank:
    """Give the model a bank of the method's kind with calibrated scales; return the bank.

    Weights get the method's ranges, if it has its own.
    """
    if method.weights is not None:
        set_weight_ranges(model, method.weights)
    if method.timesteps == "normal":
        observations = {name: pooled_as_ptq4dm(seen) for name, seen in observations.items()}
    previous = tdq.scale_bank(model)
    bank = method.bank(dict(zip(previous.names, previous.grids, strict=True)))
    initialise_scales(bank, observations, method.ranges, method.warm_start)
    tdq.set_scale_bank(model, bank)
    for _, quantizer in tdq.named_quantizers(model):
        quantizer.mode = "dynamic" if method.dynamic else "quantize"
    return bank


def sampler_weighting(
    scheduler: DDIMScheduler, weight_at_zero: float
) -> Callable[[Tensor], Tensor]:
    """Weight errors by the share of noise, sqrt(1 - alpha_t).

    At the sampler's last timestep, 0 or the scheduler's `steps_offset`, errors are far larger and
    matter least, as hardly any noise is left to remove: there and below, the weight is multiplied
    by `weight_at_zero`.
    """
    weights = (1 - scheduler.alphas_cumprod).sqrt()
    weights[: scheduler.config.steps_offset + 1] *= weight_at_zero

    def weighting(timesteps: Tensor) -> Tensor:
        chosen: Tensor = weights.to(timesteps.device)[timesteps.round().long()]
        return chosen

    return weighting
