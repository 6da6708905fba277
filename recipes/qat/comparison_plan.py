"""What `--dry-run` of a QAT recipe that compares methods prints."""

import torch

import tdq_plugin as tdq
from tdq_plugin.recipes.calibration import placeholder
from tdq_plugin.recipes.evaluation.sampling import scheduler_with
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.image_data import load_images
from tdq_plugin.recipes.plan import Plan, training_memory
from tdq_plugin.recipes.qat.comparison import check_trained
from tdq_plugin.recipes.qat.config import ComparisonConfig
from tdq_plugin.recipes.qat.methods import check_methods
from tdq_plugin.recipes.qat.stages import check

__all__ = ["plan_of"]


def plan_of(recipe: str, config: ComparisonConfig) -> Plan:
    """Check run folder, framework, model and data, and say what a run would do."""
    check(config)
    check_trained(config)
    torch.set_num_threads(config.threads)
    framework = load_framework(config.adapter)
    model = load_float_model(config.model)
    config.check_model(model)
    scheduler_with(model.scheduler, config.steps)
    data, _ = load_images(config.data, model.image_shape)
    points = placeholder(model)
    quantized = framework.prepare(model.unet, points, config.widths)
    check_methods(config.methods, quantized, config.adapter)
    tdq.calibrate(quantized, points.batches(2), samples=16, warm_start=False)
    memory = training_memory(
        quantized, points.samples, points.timesteps, beside=model.size_in_bytes
    )
    iterations = config.training.iterations
    lines = {
        "model": f"{config.model}, {model.describe()}",
        "quantizers": f"{len(tdq.scale_bank(quantized).names)} activations, {config.bits}, by "
        f"{config.adapter}",
        "data": f"{len(data):,} images",
        "methods": ", ".join(config.methods),
        "steps": f"{iterations:,} for each of {len(config.methods)} methods, batches of "
        f"{config.training.batch_size}",
        "rates": _learning_rates(config),
        "memory": memory.describe(config.training.batch_size),
        "evaluation": f"{config.evaluation.samples:,} images by {config.steps} DDIM steps",
        "results": str(config.run_folder),
    }
    return Plan(f"tdq run {recipe}", lines)


def _learning_rates(config: ComparisonConfig) -> str:
    methods: dict[float, list[str]] = {}
    for name in config.methods:
        methods.setdefault(config.training_of(name).learning_rate, []).append(name)
    shared = (f"{rate:g} for {', '.join(names)}" for rate, names in methods.items())
    return f"learning rate of the weights {'; '.join(shared)}"
