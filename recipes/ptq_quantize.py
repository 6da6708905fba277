"""From a float UNet to a quantized one by each method of the PTQ recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from diffusers import DDIMScheduler
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx

import tdq_plugin as tdq
from tdq_plugin.adapters.torch_ao import tdq_backend_config, tdq_qconfig_mapping
from tdq_plugin.calibrate import initialise_scales
from tdq_plugin.graph import copy_module_paths
from tdq_plugin.observe import Observation
from tdq_plugin.recipes.ptq_methods import Method
from tdq_plugin.reconstruct import CalibrationSet, Progress, ReconstructionConfig, reconstruct
from tdq_plugin.scales import TrainableBank

__all__ = ["Bits", "apply_method", "prepare", "sampler_weighting"]


@dataclass(frozen=True)
class Bits:
    """Bits of weights and activations, written `W8A4`."""

    weights: int
    activations: int

    def __str__(self) -> str:
        return f"W{self.weights}A{self.activations}"


def prepare(model: nn.Module, example: tuple[Tensor, Tensor], bits: Bits) -> fx.GraphModule:
    """Trace, prepare with torch.ao and attach; the scales are not calibrated yet."""
    graph = tdq.trace(model, example)
    mapping = tdq_qconfig_mapping(graph, bits.activations, bits.weights)
    prepared = prepare_qat_fx(graph.train(), mapping, example, backend_config=tdq_backend_config())
    copy_module_paths(graph.graph, prepared.graph)
    return tdq.attach(prepared).eval()


def apply_method(
    model: fx.GraphModule,
    method: Method,
    observations: dict[str, Observation],
    data: CalibrationSet,
    config: ReconstructionConfig | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> TrainableBank:
    """Give the model a bank of the method's kind, calibrated and trained; return the bank."""
    previous = tdq.scale_bank(model)
    bank = method.bank(dict(zip(previous.names, previous.grids, strict=True)))
    initialise_scales(bank, observations, method.ranges, method.warm_start)
    tdq.set_scale_bank(model, bank)
    for _, quantizer in tdq.named_quantizers(model):
        quantizer.mode = "dynamic" if method.dynamic else "quantize"
    if method.trained:
        reconstruct(model, data, config, weighting, checkpoint, progress)
    return bank


def sampler_weighting(scheduler: DDIMScheduler) -> Callable[[Tensor], Tensor]:
    """Weight errors by the share of noise, sqrt(1 - alpha_t): at t = 0 noise hardly matters."""
    weights = (1 - scheduler.alphas_cumprod).sqrt()

    def weighting(timesteps: Tensor) -> Tensor:
        chosen: Tensor = weights[timesteps.round().long()]
        return chosen

    return weighting
