"""The objective of a model that is no graph: its output, as a whole."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.evaluation_mode import evaluation_mode
from tdq_plugin.hooks import argument_names
from tdq_plugin.model_output import first_tensor
from tdq_plugin.reconstruct.collect import CalibrationSet
from tdq_plugin.reconstruct.switches import quantization
from tdq_plugin.reconstruct.train import Objective

__all__ = ["Denoiser", "whole_model_objective"]

Denoiser = Callable[..., Any]


def whole_model_objective(
    model: nn.Module, data: CalibrationSet, reference: Denoiser | None = None
) -> Objective:
    """Bring a model's output to that of the float model.

    Args:
        model: An attached model.
        data: Its inputs.
        reference: The float model; by default the model with its quantizers off. It is called by
            the model's names of the sample and the timestep if it has both, else by position. A
            module runs in evaluation mode.

    Raises:
        AdapterError: The model's scales do not travel by hooks, or its forward has no argument for
            the sample.
    """
    names = argument_names(model, data.conditions)
    denoiser = _by_name(model, names)

    def run(index: Tensor) -> list[Tensor]:
        conditions = {name: value[index] for name, value in data.conditions.items()}
        return [first_tensor(denoiser(data.samples[index], data.timesteps[index], **conditions))]

    evaluated = evaluation_mode(reference)
    if reference is not None and _has_arguments(reference, names):
        reference = _by_name(reference, names)
    with quantization(model, enabled=False), evaluated:
        target = _outputs(reference or denoiser, data)
    return Objective("network", run, [target], data.timesteps)


def _by_name(denoiser: Denoiser, names: tuple[str, str]) -> Denoiser:
    """Called as `(sample, timestep)`, whatever the order of its own arguments is."""

    def call(samples: Tensor, timesteps: Tensor, **conditions: Tensor) -> Any:
        return denoiser(**dict(zip(names, (samples, timesteps), strict=True)), **conditions)

    return call


def _has_arguments(denoiser: Denoiser, names: tuple[str, str]) -> bool:
    forward = denoiser.forward if isinstance(denoiser, nn.Module) else denoiser
    return inspect.signature(forward).parameters.keys() >= set(names)


@torch.no_grad()
def _outputs(denoiser: Denoiser, data: CalibrationSet, batch_size: int = 128) -> Tensor:
    outputs = []
    for samples, timesteps, *conditions in data.batches(batch_size):
        by_name = conditions[0] if conditions else {}
        outputs.append(first_tensor(denoiser(samples, timesteps, **by_name)))
    return torch.cat(outputs)
