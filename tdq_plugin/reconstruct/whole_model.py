"""The objective of a model that is no graph: its output, as a whole."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.reconstruct.collect import CalibrationSet, first_tensor
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
        reference: The float model; by default the model with its quantizers off.
    """

    def run(index: Tensor) -> list[Tensor]:
        conditions = {name: value[index] for name, value in data.conditions.items()}
        return [first_tensor(model(data.samples[index], data.timesteps[index], **conditions))]

    with quantization(model, enabled=False):
        target = _outputs(reference or model, data)
    return Objective("network", run, [target], data.timesteps)


@torch.no_grad()
def _outputs(model: Denoiser, data: CalibrationSet, batch_size: int = 128) -> Tensor:
    outputs = []
    for samples, timesteps, *conditions in data.batches(batch_size):
        by_name = conditions[0] if conditions else {}
        outputs.append(first_tensor(model(samples, timesteps, **by_name)))
    return torch.cat(outputs)
