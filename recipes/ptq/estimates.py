"""What a PTQ recipe will need, before it starts: calibration samples, steps, memory."""

import math

from torch import fx, nn

import tdq_plugin as tdq
from tdq_plugin.recipes.calibration import CalibrationSection
from tdq_plugin.recipes.plan import parameter_bytes, training_memory
from tdq_plugin.recipes.ptq.training import ReconstructionSection
from tdq_plugin.reconstruct import CalibrationSet, find_blocks
from tdq_plugin.reconstruct.collect import samples_per_step
from tdq_plugin.reconstruct.stream import Stream
from tdq_plugin.reconstruct.switches import only_trainable

__all__ = ["calibration_samples", "describe_memory", "training_steps"]


def calibration_samples(
    section: CalibrationSection, steps: int, latent_shape: tuple[int, int, int]
) -> int:
    """How many samples the trajectories give.

    Raises:
        CalibrationError: The byte budget does not hold one of each timestep.
    """
    groups = len(section.shifts)
    counts = samples_per_step(
        steps,
        section.images // groups,
        section.distribution,
        4 * math.prod(latent_shape),
        section.byte_budget // groups,
    )
    return groups * sum(counts)


def training_steps(section: ReconstructionSection, quantized: nn.Module) -> int:
    """Optimizer steps of a trained method, of all blocks together."""
    graph = _graph_of_blocks(section, quantized)
    return section.iterations * (1 if graph is None else len(find_blocks(graph.graph)))


def describe_memory(
    section: ReconstructionSection,
    learn_rounding: bool,
    samples: int,
    quantized: nn.Module,
    points: CalibrationSet,
) -> str:
    """Of reconstruction, estimated: weights, data, what flows between blocks, activations.

    Args:
        section: How scales are trained.
        learn_rounding: Whether the rounding of the weights is, too.
        samples: Of the calibration.
        quantized: A calibrated quantized model.
        points: Two of them.
    """
    parameters = parameter_bytes(quantized)
    # Float model, quantized model, the weights every method starts from; for AdaRound a variable
    # for each weight, its gradient and Adam's two moments.
    weights = (7 if learn_rounding else 3) * parameters
    waiting = points.samples[0].nbytes
    graph = _graph_of_blocks(section, quantized)
    if graph is not None:
        waiting += 2 * _between_blocks(graph, points)
    with only_trainable(quantized, tdq.scale_bank(quantized).parameters()):
        step = training_memory(quantized, points.samples, points.timesteps)
    size = section.batch_size
    total = weights + samples * waiting + size * step.activations
    return (
        f"{total / 1e9:.2f} GB: {weights / 1e9:.2f} for weights, {samples * waiting / 1e9:.2f} for "
        f"calibration, {step.activations / 1e6:.1f} MB for each of {size} samples in a step"
    )


def _graph_of_blocks(section: ReconstructionSection, quantized: nn.Module) -> fx.GraphModule | None:
    """The model as a graph that is trained block by block; None if it is trained as a whole."""
    if section.granularity == "block" and isinstance(quantized, fx.GraphModule):
        return quantized
    return None


def _between_blocks(quantized: fx.GraphModule, points: CalibrationSet) -> int:
    """Bytes of one sample that wait for later blocks, at most."""
    stream = Stream(quantized, CalibrationSet(points.samples[:1], points.timesteps[:1]))
    blocks, largest = find_blocks(quantized.graph), 0
    for position, block in enumerate(blocks):
        stream.advance(block)
        largest = max(largest, sum(value.nbytes for value in stream.values.values()))
        stream.forget(blocks[position + 1 :])
    return largest
