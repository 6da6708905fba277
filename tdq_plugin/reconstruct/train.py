"""Train the parameters of one block."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx

from tdq_plugin.attach import scale_bank
from tdq_plugin.errors import CalibrationError
from tdq_plugin.reconstruct.blocks import Block, run_block
from tdq_plugin.reconstruct.config import ReconstructionConfig
from tdq_plugin.reconstruct.stream import Stream
from tdq_plugin.reconstruct.switches import only_trainable
from tdq_plugin.rounding import LearnedRounding, rounding_penalty
from tdq_plugin.scales.bank import ScaleBank

__all__ = ["train_block"]


def train_block(
    model: fx.GraphModule,
    block: Block,
    quantized: Stream,
    target: Stream,
    config: ReconstructionConfig,
    roundings: Sequence[LearnedRounding],
    weighting: Callable[[Tensor], Tensor] | None,
    report: Callable[[int, float], None],
) -> float:
    """Bring a block's output to that of the float model.

    Args:
        model: The graph.
        block: Its block.
        quantized: Inputs of the block, of the quantized model.
        target: Outputs of the block, of the float model.
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
            index = torch.randint(len(quantized), (config.batch_size,), generator=generator)
            outputs = run_block(model, block, quantized.inputs(block, index))
            timesteps = quantized.timesteps[index]
            weights = weighting(timesteps) if weighting else torch.ones_like(timesteps)
            loss = _distance(outputs, target.values, index, weights)
            value = float(loss.detach())
            if roundings:
                penalty = rounding_penalty(roundings, step / config.iterations)
                loss = loss + config.rounding_regularisation * penalty
            for each in optimizers:
                each.zero_grad()
            loss.backward()
            for each in optimizers:
                each.step()
            schedule.step()
            if not value < float("inf"):
                raise CalibrationError(
                    f"The loss of block {block.name!r} is {value} at step {step}. "
                    "Lower the learning rate."
                )
            report(step, value)
    return value


def _optimizer(bank: ScaleBank, config: ReconstructionConfig) -> torch.optim.Adam:
    scales = [p for name, p in bank.named_parameters() if name != "zero_point"]
    groups = [
        {"params": scales, "lr": config.learning_rate},
        {"params": [bank.get_parameter("zero_point")], "lr": config.zero_point_learning_rate},
    ]
    return torch.optim.Adam(groups)


def _distance(
    outputs: dict[fx.Node, Tensor], target: dict[fx.Node, Tensor], index: Tensor, weights: Tensor
) -> Tensor:
    """Weighted squared error, relative to the size of each target."""
    total = weights.new_zeros(())
    for node, output in outputs.items():
        wanted = target[node][index]
        error = (output - wanted).square().flatten(1).mean(dim=1)
        total = total + (weights * error).mean() / wanted.square().mean()
    return total
