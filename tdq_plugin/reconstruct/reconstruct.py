"""PTQ: train scales so that each block gives the float model's output (BRECQ style)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx, nn

from tdq_plugin.attach import named_quantizers, scale_bank
from tdq_plugin.errors import AdapterError
from tdq_plugin.reconstruct.blocks import Block, find_blocks
from tdq_plugin.reconstruct.checkpoint import load_checkpoint, save_checkpoint
from tdq_plugin.reconstruct.collect import CalibrationSet
from tdq_plugin.reconstruct.config import ReconstructionConfig
from tdq_plugin.reconstruct.rounded_layers import RoundedLayers
from tdq_plugin.reconstruct.stream import Stream
from tdq_plugin.reconstruct.switches import quantization
from tdq_plugin.reconstruct.train import train_block
from tdq_plugin.scales.bank import TrainableBank

__all__ = ["Progress", "reconstruct"]


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
    """Train the model's scale bank on calibration data; in place.

    Weights stay as they are, unless `config.learn_rounding` has their rounding learned too. They
    then become multiples of their scales; after an error they are as before.

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
        AdapterError: The model is not a graph, its bank is frozen, or its rounding shall be
            learned and it has no weight quantizers.
        CalibrationError: The loss is not finite.
    """
    config = config or ReconstructionConfig()
    bank = scale_bank(model)
    if not isinstance(bank, TrainableBank) or not isinstance(model, fx.GraphModule):
        raise AdapterError(
            f"Reconstruction needs a traced graph with a trainable bank, not a "
            f"{type(model).__name__} with a {type(bank).__name__}. Call it before freeze."
        )
    with RoundedLayers(model) as rounded:
        if config.learn_rounding:
            rounded.check()
        return _reconstruct(model, data, config, weighting, rounded, checkpoint, progress)


def _reconstruct(
    model: fx.GraphModule,
    data: CalibrationSet,
    config: ReconstructionConfig,
    weighting: Callable[[Tensor], Tensor] | None,
    rounded: RoundedLayers,
    checkpoint: Path | None,
    progress: Callable[[Progress], None] | None,
) -> list[float]:
    bank = scale_bank(model)
    blocks = find_blocks(model.graph, config.granularity)
    trained = [block for block in blocks if _has_quantizers(block, model)]
    losses = load_checkpoint(checkpoint, bank, rounded, config) if checkpoint is not None else []
    quantized, target = Stream(model, data), Stream(model, data)
    for position, block in enumerate(blocks):
        with quantization(model, enabled=False):
            target.advance(block)
        if block in trained and trained.index(block) >= len(losses):
            roundings = rounded.learn(block) if config.learn_rounding else []
            report = _counter(progress, block, len(losses), len(trained), config)
            losses.append(
                train_block(model, block, quantized, target, config, roundings, weighting, report)
            )
            rounded.harden()
            if checkpoint is not None:
                save_checkpoint(checkpoint, bank, rounded, config, losses)
        quantized.advance(block)
        for stream in (quantized, target):
            stream.forget(blocks[position + 1 :])
    return losses


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
