"""Train the scales of a block, or of a whole model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdq_plugin.attach import scale_bank
from tdq_plugin.errors import CalibrationError
from tdq_plugin.reconstruct.config import ReconstructionConfig
from tdq_plugin.reconstruct.switches import only_trainable
from tdq_plugin.rounding import LearnedRounding, rounding_penalty
from tdq_plugin.scales.bank import ScaleBank

__all__ = ["Objective", "train_scales"]


@dataclass(frozen=True)
class Objective:
    """What a training brings together.

    Attributes:
        name: Of the block, for messages.
        run: From indices of samples to the quantized outputs.
        targets: The float outputs for all N samples, in the same order.
        timesteps: Of all samples, shape `(N,)`.
    """

    name: str
    run: Callable[[Tensor], Sequence[Tensor]]
    targets: Sequence[Tensor]
    timesteps: Tensor


def train_scales(
    model: nn.Module,
    objective: Objective,
    config: ReconstructionConfig,
    roundings: Sequence[LearnedRounding],
    weighting: Callable[[Tensor], Tensor] | None,
    report: Callable[[int, float], None],
) -> float:
    """Bring the quantized outputs to those of the float model.

    Args:
        model: The attached model.
        objective: What to bring together.
        config: How to train.
        roundings: Trained with the scale bank.
        weighting: As in `reconstruct`.
        report: Called with the step and its loss.

    Returns:
        The last loss, without the penalty of the rounding.

    Raises:
        CalibrationError: The loss is not finite.
    """
    bank = scale_bank(model)
    learned = [rounding.v for rounding in roundings]
    optimizer = _optimizer(bank, config)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    optimizers: list[torch.optim.Optimizer] = [optimizer]
    if learned:
        # No decay: the penalty decides the last roundings at the very end.
        optimizers.append(torch.optim.Adam(learned, config.rounding_learning_rate))
    generator = torch.Generator().manual_seed(config.seed)
    value = 0.0
    with only_trainable(model, [*bank.parameters(), *learned]), torch.enable_grad():
        for step in range(config.iterations):
            count = len(objective.timesteps)
            index = torch.randint(count, (config.batch_size,), generator=generator)
            timesteps = objective.timesteps[index]
            weights = weighting(timesteps) if weighting else torch.ones_like(timesteps)
            targets = [target[index] for target in objective.targets]
            loss = _distance(objective.run(index), targets, weights)
            value = float(loss.detach())
            if not value < float("inf"):
                raise CalibrationError(
                    f"The loss of block {objective.name!r} is {value} at step {step}. "
                    "Lower the learning rate."
                )
            if roundings:
                penalty = rounding_penalty(roundings, step / config.iterations)
                loss = loss + config.rounding_regularisation * penalty
            for each in optimizers:
                each.zero_grad()
            loss.backward()
            for each in optimizers:
                each.step()
            schedule.step()
            report(step, value)
    return value


def _optimizer(bank: ScaleBank, config: ReconstructionConfig) -> torch.optim.Adam:
    scales = [p for name, p in bank.named_parameters() if name != "zero_point"]
    groups = [
        {"params": scales, "lr": config.learning_rate},
        {"params": [bank.get_parameter("zero_point")], "lr": config.zero_point_learning_rate},
    ]
    return torch.optim.Adam(groups)


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Weighted squared error, relative to the size of each target unless that is zero."""
    total = weights.new_zeros(())
    for output, wanted in zip(outputs, targets, strict=True):
        error = (output - wanted).square().flatten(1).mean(dim=1)
        size = wanted.square().mean()
        total = total + (weights * error).mean() / size.where(size > 0, 1)
    return total
