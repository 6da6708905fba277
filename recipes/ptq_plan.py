"""What `--dry-run` of a full-size PTQ recipe prints."""

import torch
from torch import fx, nn

import tdq_plugin as tdq
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.image_data import load_all_images
from tdq_plugin.recipes.image_quality import FEATURE_SPACES, missing_packages
from tdq_plugin.recipes.plan import Plan, training_memory
from tdq_plugin.recipes.ptq_full_size import load_model
from tdq_plugin.recipes.ptq_full_size_config import FullSizePTQConfig
from tdq_plugin.recipes.ptq_methods import METHODS
from tdq_plugin.recipes.ptq_weights import check_weights, is_symmetric, set_weight_ranges
from tdq_plugin.reconstruct import CalibrationSet, find_blocks
from tdq_plugin.reconstruct.collect import samples_per_step
from tdq_plugin.reconstruct.stream import Stream
from tdq_plugin.reconstruct.switches import only_trainable

__all__ = ["plan_of"]


def plan_of(recipe: str, config: FullSizePTQConfig) -> Plan:
    """Check framework, model and data, and say what a run would do."""
    torch.set_num_threads(config.threads)
    framework = load_framework(config.adapter)
    check_weights(config.weights, framework, config.adapter)
    model = load_model(config)
    images = load_all_images(config.data, model.image_shape)
    images[torch.arange(1)]  # Can it be read?
    samples = _samples(config, model)
    points = CalibrationSet(torch.zeros(2, *model.latent_shape), torch.zeros(2))
    quantized = framework.prepare(model.unet, points, config.widths)
    set_weight_ranges(quantized, config.weights)
    tdq.calibrate(quantized, points.batches(2), samples=16, warm_start=False)
    blocks = _blocks(config, quantized)
    trained = [METHODS[name].title for name in config.methods if METHODS[name].trained]
    section = config.evaluation
    calls = section.steps * section.samples * (1 + len(config.rows))
    missing = missing_packages(section.features)
    lines = {
        "model": f"{config.model}, {model.describe()}",
        "quantizers": f"{len(tdq.scale_bank(quantized).names)} activations, {config.bits}, by "
        f"{config.adapter}, weights {config.weights}",
        "methods": ", ".join(METHODS[name].title for name in config.methods),
        "calibration": f"{samples:,} samples of {config.calibration.images} "
        f"trajectories of {section.steps} DDIM steps",
        "steps": f"{config.reconstruction.iterations * blocks:,} in batches of "
        f"{config.reconstruction.batch_size} for each of: {', '.join(trained) or 'none'}",
        "memory": _memory(config, samples, quantized, points),
        "correction": _correction(config),
        "evaluation": f"{section.samples:,} images by {section.steps} DDIM steps of the float "
        f"model and {len(config.rows)} quantized ones, {calls:,} denoised images, compared with "
        f"{len(images):,} real images",
        "features": FEATURE_SPACES[section.features],
        "installed": f"missing: {', '.join(missing)}; the run would stop" if missing else "yes",
        "results": str(config.run_folder),
        "models": "in models/, as the framework deploys them"
        if is_symmetric(config.weights)
        else "none: integer kernels take symmetric weights",
    }
    return Plan(f"tdq run {recipe}", lines)


def _blocks(config: FullSizePTQConfig, quantized: nn.Module) -> int:
    if config.reconstruction.granularity == "block" and isinstance(quantized, fx.GraphModule):
        return len(find_blocks(quantized.graph))
    return 1


def _correction(config: FullSizePTQConfig) -> str:
    section = config.correction
    titles = ", ".join(METHODS[name].title for name in section.methods)
    calls = 2 * section.images * config.evaluation.steps
    return f"{titles}: {calls:,} denoised images for each" if titles else "none"


def _samples(config: FullSizePTQConfig, model: FloatModel) -> int:
    section = config.calibration
    groups = len(section.shifts)
    counts = samples_per_step(
        config.evaluation.steps,
        section.images // groups,
        section.distribution,
        model.latent_shape,
        section.byte_budget // groups,
    )
    return groups * sum(counts)


def _memory(
    config: FullSizePTQConfig, samples: int, quantized: nn.Module, points: CalibrationSet
) -> str:
    """Of reconstruction, estimated: weights, data, what flows between blocks, activations."""
    parameters = sum(p.numel() * p.element_size() for p in quantized.parameters())
    # Float model, quantized model, the weights every method starts from; for AdaRound a variable
    # for each weight, its gradient and Adam's two moments.
    weights = (7 if config.weights == "adaround" else 3) * parameters
    waiting = points.samples[0].nbytes
    if config.reconstruction.granularity == "block" and isinstance(quantized, fx.GraphModule):
        waiting += 2 * _between_blocks(quantized, points)
    with only_trainable(quantized, tdq.scale_bank(quantized).parameters()):
        step = training_memory(quantized, points.samples, points.timesteps)
    size = config.reconstruction.batch_size
    total = weights + samples * waiting + size * step.activations
    return (
        f"{total / 1e9:.2f} GB: {weights / 1e9:.2f} for weights, {samples * waiting / 1e9:.2f} for "
        f"calibration, {step.activations / 1e6:.1f} MB for each of {size} samples in a step"
    )


def _between_blocks(quantized: fx.GraphModule, points: CalibrationSet) -> int:
    """Bytes of one sample that wait for later blocks, at most."""
    stream = Stream(quantized, CalibrationSet(points.samples[:1], points.timesteps[:1]))
    blocks, largest = find_blocks(quantized.graph), 0
    for position, block in enumerate(blocks):
        stream.advance(block)
        largest = max(largest, sum(value.nbytes for value in stream.values.values()))
        stream.forget(blocks[position + 1 :])
    return largest
