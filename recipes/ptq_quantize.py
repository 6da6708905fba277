"""Give a prepared model the scales of each method of the PTQ recipe."""

from collections.abc import Callable

from diffusers import DDIMScheduler
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.calibrate import initialise_scales
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.ptq_methods import Method
from tdq_plugin.scales import TrainableBank

__all__ = ["apply_method", "sampler_weighting"]


def apply_method(
    model: nn.Module, method: Method, observations: dict[str, Observation]
) -> TrainableBank:
    """Give the model a bank of the method's kind with calibrated scales; return the bank."""
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

    At t = 0 errors are far larger and matter least, as hardly any noise is left to remove: there
    the weight is multiplied by `weight_at_zero`.
    """
    weights = (1 - scheduler.alphas_cumprod).sqrt()
    weights[0] *= weight_at_zero

    def weighting(timesteps: Tensor) -> Tensor:
        chosen: Tensor = weights[timesteps.round().long()]
        return chosen

    return weighting
