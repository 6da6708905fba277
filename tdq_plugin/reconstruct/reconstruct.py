"""PTQ: train scales so that the model, or each block of it, gives the float model's output."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, fx, nn

from tdq_plugin.attach import named_quantizers, scale_bank
from tdq_plugin.errors import AdapterError, CalibrationError
from tdq_plugin.evaluation_mode import evaluation_mode
from tdq_plugin.reconstruct.blocks import Block, find_blocks, run_block
from tdq_plugin.reconstruct.checkpoint import Checkpoint
from tdq_plugin.reconstruct.collect import CalibrationSet
from tdq_plugin.reconstruct.config import ReconstructionConfig
from tdq_plugin.reconstruct.rounded_layers import RoundedLayers
from tdq_plugin.reconstruct.stream import Stream
from tdq_plugin.reconstruct.switches import quantization
from tdq_plugin.reconstruct.train import Objective, train_scales
from tdq_plugin.reconstruct.whole_model import Denoiser, whole_model_objective
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
    model: nn.Module,
    data: CalibrationSet,
    config: ReconstructionConfig | None = None,
    weighting: Callable[[Tensor], Tensor] | None = None,
    checkpoint: str | Path | None = None,
    progress: Callable[[Progress], None] | None = None,
    reference: Denoiser | None = None,
) -> list[float]:
    """Train the model's scale bank on calibration data; in place.

    A traced graph can be trained block by block, as BRECQ does (arXiv 2102.05426); any other
    model is trained on its output. Weights stay as they are, unless `config.learn_rounding` has
    their rounding learned too. They then become multiples of their scales; after an error they
    are as before. The model runs in evaluation mode, without dropout.

    Args:
        model: An attached and calibrated model.
        data: Inputs of the model.
        config: How to train.
        weighting: From timesteps `(B,)` to weights of the samples' errors `(B,)`; by default 1.
        checkpoint: File that is written after each block; a later call with the same arguments
            continues after the last block in it.
        progress: Called after each step.
        reference: The float model, for a model that is not a traced graph. Without it, the
            model itself with its activations in float, which keeps a framework's own weight
            quantizers.

    Returns:
        The last loss of each block that has quantizers.

    Raises:
        AdapterError: The model's bank is frozen, it is no graph and shall be trained by blocks,
            its rounding shall be learned and it has no weight quantizers, or its inputs are not
            those of the data.
        CalibrationError: The data are no `CalibrationSet` or empty, or the loss is not finite.
        ConfigError: The checkpoint belongs to another configuration, bank or model, or to this
            model before it was reconstructed.
    """
    config = config or ReconstructionConfig()
    if not isinstance(data, CalibrationSet) or not len(data):
        raise CalibrationError(
            f"data is {'empty' if isinstance(data, CalibrationSet) else type(data).__name__}. Give "
            "it what collect_trajectories returns, or CalibrationSet(samples, timesteps)."
        )
    bank = scale_bank(model)
    if not isinstance(bank, TrainableBank):
        raise AdapterError(
            f"The model's bank is a {type(bank).__name__}: nothing to train. Reconstruct before "
            "freeze."
        )
    kept = Checkpoint(checkpoint, model, config)
    with evaluation_mode(model):
        if not isinstance(model, fx.GraphModule):
            return _reconstruct_whole(model, data, config, weighting, kept, progress, reference)
        with RoundedLayers(model) as rounded:
            if config.learn_rounding:
                rounded.check()
            return _reconstruct(model, data, config, weighting, rounded, kept, progress)


def _reconstruct_whole(
    model: nn.Module,
    data: CalibrationSet,
    config: ReconstructionConfig,
    weighting: Callable[[Tensor], Tensor] | None,
    checkpoint: Checkpoint,
    progress: Callable[[Progress], None] | None,
    reference: Denoiser | None,
) -> list[float]:
    if config.granularity != "network" or config.learn_rounding:
        raise AdapterError(
            f"granularity={config.granularity!r} with learn_rounding={config.learn_rounding} "
            f"needs a traced graph, and this is a {type(model).__name__}. Use "
            "granularity='network' without learned rounding."
        )
    rounded = RoundedLayers(model)
    losses = checkpoint.load(rounded)
    if not losses:
        objective = whole_model_objective(model, data, reference)
        report = _counter(progress, objective.name, 0, 1, config)
        losses = [train_scales(model, objective, config, [], weighting, report)]
        checkpoint.save(rounded, losses)
    return losses


def _reconstruct(
    model: fx.GraphModule,
    data: CalibrationSet,
    config: ReconstructionConfig,
    weighting: Callable[[Tensor], Tensor] | None,
    rounded: RoundedLayers,
    checkpoint: Checkpoint,
    progress: Callable[[Progress], None] | None,
) -> list[float]:
    blocks = find_blocks(model.graph, config.granularity)
    trained = [block for block in blocks if _has_quantizers(block, model)]
    losses = checkpoint.load(rounded)
    quantized, target = Stream(model, data), Stream(model, data)
    for position, block in enumerate(blocks):
        with quantization(model, enabled=False):
            target.advance(block)
        if block in trained and trained.index(block) >= len(losses):
            roundings = rounded.learn(block) if config.learn_rounding else []
            report = _counter(progress, block.name, len(losses), len(trained), config)
            objective = _objective(model, block, quantized, target)
            losses.append(train_scales(model, objective, config, roundings, weighting, report))
            rounded.harden()
            checkpoint.save(rounded, losses)
        quantized.advance(block)
        for stream in (quantized, target):
            stream.forget(blocks[position + 1 :])
    return losses


def _objective(model: fx.GraphModule, block: Block, quantized: Stream, target: Stream) -> Objective:
    def run(index: Tensor) -> list[Tensor]:
        values = run_block(model, block, quantized.inputs(block, index))
        return [values[node] for node in block.outputs]

    targets = [target.values[node] for node in block.outputs]
    return Objective(block.name, run, targets, quantized.timesteps)


def _counter(
    progress: Callable[[Progress], None] | None,
    block: str,
    offset: int,
    blocks: int,
    config: ReconstructionConfig,
) -> Callable[[int, float], None]:
    def report(step: int, loss: float) -> None:
        if progress is not None:
            done = offset * config.iterations + step + 1
            progress(Progress(done, blocks * config.iterations, block, loss))

    return report


def _has_quantizers(block: Block, model: nn.Module) -> bool:
    paths = {str(node.target) for node in block.nodes if node.op == "call_module"}
    return any(model.get_submodule(path) in _quantizers(model) for path in paths)


def _quantizers(model: nn.Module) -> set[nn.Module]:
    return {quantizer for _, quantizer in named_quantizers(model)}
