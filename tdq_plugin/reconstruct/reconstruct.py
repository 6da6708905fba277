"""PTQ: train activation scales so that each block gives the float model's output (BRECQ style)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from tdq_plugin.attach import named_quantizers, scale_bank
from tdq_plugin.errors import AdapterError, CalibrationError, ConfigError
from tdq_plugin.reconstruct.blocks import Block, Granularity, find_blocks, run_block
from tdq_plugin.reconstruct.checkpoint import load_checkpoint, save_checkpoint
from tdq_plugin.reconstruct.collect import CalibrationSet
from tdq_plugin.reconstruct.stream import Stream
from tdq_plugin.reconstruct.switches import only_trainable, quantization
from tdq_plugin.scales.bank import TrainableBank

__all__ = ["Progress", "ReconstructionConfig", "reconstruct"]


@dataclass(frozen=True)
class ReconstructionConfig:
    """How scales are trained.

    Attributes:
        granularity: `block`: one residual or attention block after the other, each fed by the
            quantized blocks before it. `network`: all scales at once on the model's output.
        iterations: Adam steps for each block.
        batch_size: Samples in a step.
        learning_rate: Of the scales' parameters, decayed to zero by a cosine.
        zero_point_learning_rate: Of the zero points, in steps of the grid.
        seed: Seed of the batches.

    Raises:
        ConfigError: A number is not positive.
    """

    granularity: Granularity = "network"
    iterations: int = 200
    batch_size: int = 32
    learning_rate: float = 3e-3
    zero_point_learning_rate: float = 3e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.iterations, self.batch_size) < 1 or self.learning_rate <= 0:
            raise ConfigError(f"{self} needs positive numbers.")


@dataclass(frozen=True)
class Progress:
    """Where a reconstruction stands: step `step` of `steps`, in block `block`, with `loss`."""

    step: int
    steps: int
    block: str
    loss: float


def reconstruct(
    model: fx.GraphModule,
    data: CalibrationSet,
    config: ReconstructionConfig | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    checkpoint: Path | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> list[float]:
    """Train the model's scale bank on calibration data; in place. Weights stay as they are.

    Args:
        model: An attached and calibrated graph.
        data: Inputs of the model.
        config: How to train.
        weighting: From timesteps `(B,)` to weights of the samples' errors `(B,)`; by default 1.
        checkpoint: File that is written after each block; a later call with the same arguments
            continues after the last block in it.
        progress: Called after each step.

    Returns:
        The last loss of each block that has quantizers.

    Raises:
        AdapterError: The model is not a graph, or its bank is frozen.
        CalibrationError: The loss is not finite.
    """
    config = config or ReconstructionConfig()
    bank = scale_bank(model)
    if not isinstance(bank, TrainableBank) or not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"Reconstruction needs a traced graph with a trainable bank, not a "
            f"{type(model).__name__} with a {type(bank).__name__}. Call it before freeze."
        )
    blocks = find_blocks(model.graph, config.granularity)
    trained = [block for block in blocks if _has_quantizers(block, model)]
    losses = load_checkpoint(checkpoint, bank, config) if checkpoint is not None else []
    quantized, target = Stream(model, data), Stream(model, data)
    for position, block in enumerate(blocks):
        with quantization(model, enabled=False):
            target.advance(block)
        if block in trained and trained.index(block) >= len(losses):
            offset = len(losses)
            losses.append(
                _train(
                    model,
                    block,
                    quantized,
                    target,
                    config,
                    weighting,
                    _counter(progress, block, offset, len(trained), config),
                )
            )
            if checkpoint is not None:
                save_checkpoint(checkpoint, bank, config, losses)
        quantized.advance(block)
        for stream in (quantized, target):
            stream.forget(blocks[position + 1 :])
    return losses


def _train(
    model: fx.GraphModule,
    block: Block,
    quantized: Stream,
    target: Stream,
    config: ReconstructionConfig,
    weighting: Callable[[Tensor], Tensor] | None,
    report: Callable[[int, float], None],
) -> float:
    bank = scale_bank(model)
    scales = [p for name, p in bank.named_parameters() if name != "zero_point"]
    groups = [
        {"params": scales, "lr": config.learning_rate},
        {"params": [bank.get_parameter("zero_point")], "lr": config.zero_point_learning_rate},
    ]
    optimizer = torch.optim.Adam(groups)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.iterations)
    generator = torch.Generator().manual_seed(config.seed)
    value = 0.0
    with only_trainable(model, bank), torch.enable_grad():
        for step in range(config.iterations):
            index = torch.randint(len(quantized), (config.batch_size,), generator=generator)
            outputs = run_block(model, block, quantized.inputs(block, index))
            timesteps = quantized.timesteps[index]
            weights = weighting(timesteps) if weighting else torch.ones_like(timesteps)
            loss = _distance(outputs, target.values, index, weights)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            value = float(loss.detach())
            if not value < float("inf"):
                raise CalibrationError(
                    f"The loss of block {block.name!r} is {value} at step {step}. "
                    "Lower the learning rate."
                )
            report(step, value)
    return value


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


def _counter(
    progress: Callable[[Progress], None] | None,
    block: Block,
    offset: int,
    blocks: int,
    config: ReconstructionConfig,
) -> Callable[[int, float], None]:
    def report(step: int, loss: float) -> None:
        if progress is not None:
            done = offset * config.iterations + step + 1
            progress(Progress(done, blocks * config.iterations, block.name, loss))

    return report


def _has_quantizers(block: Block, model: nn.Module) -> bool:
    paths = {str(node.target) for node in block.nodes if node.op == "call_module"}
    return any(model.get_submodule(path) in _quantizers(model) for path in paths)


def _quantizers(model: nn.Module) -> set[nn.Module]:
    return {quantizer for _, quantizer in named_quantizers(model)}
