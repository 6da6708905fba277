"""What `--dry-run` of a full-size PTQ recipe prints."""

import torch

import tdq_plugin as tdq
from tdq_plugin.recipes.calibration import placeholder
from tdq_plugin.recipes.evaluation.image_quality import FEATURE_SPACES, missing_packages
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.image_data import load_all_images
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.ptq.estimates import calibration_samples, describe_memory, training_steps
from tdq_plugin.recipes.ptq.full_size import load_model
from tdq_plugin.recipes.ptq.full_size_config import FullSizePTQConfig
from tdq_plugin.recipes.ptq.methods import METHODS, check_framework
from tdq_plugin.recipes.ptq.weights import check_weights, is_symmetric, set_weight_ranges
from tdq_plugin.recipes.run_state import check_folder

__all__ = ["plan_of"]


def plan_of(recipe: str, config: FullSizePTQConfig) -> Plan:
    """Check run folder, framework, model and data, and say what a run would do."""
    check_folder(config.run_folder, config.model_dump(mode="json"), config.changeable)
    torch.set_num_threads(config.threads)
    framework = load_framework(config.adapter)
    check_weights(config.weights, framework, config.adapter)
    check_framework(config.methods, framework, config.adapter)
    config.reconstruction.check(framework, config.adapter)
    model = load_model(config)
    images = load_all_images(config.data, model.image_shape)
    images[torch.arange(1)]  # Can it be read?
    section = config.evaluation
    samples = calibration_samples(config.calibration, section.steps, model.latent_shape)
    points = placeholder(model)
    quantized = framework.prepare(model.unet, points, config.widths)
    set_weight_ranges(quantized, config.weights)
    tdq.calibrate(quantized, points.batches(2), samples=16, warm_start=False)
    iterations = training_steps(config.reconstruction, quantized)
    trained = [METHODS[name].title for name in config.methods if METHODS[name].trained]
    calls = section.steps * section.samples * (1 + len(config.rows))
    missing = missing_packages(section.features)
    lines = {
        "model": f"{config.model}, {model.describe()}",
        "quantizers": f"{len(tdq.scale_bank(quantized).names)} activations, {config.bits}, by "
        f"{config.adapter}, weights {config.weights}",
        "methods": ", ".join(METHODS[name].title for name in config.methods),
        "calibration": f"{samples:,} samples of {config.calibration.images} "
        f"trajectories of {section.steps} DDIM steps",
        "steps": f"{iterations:,} in batches of "
        f"{config.reconstruction.batch_size} for each of: {', '.join(trained) or 'none'}",
        "memory": describe_memory(
            config.reconstruction, config.weights == "adaround", samples, quantized, points
        ),
        "correction": _correction(config),
        "evaluation": f"{section.samples:,} images by {section.steps} DDIM steps of the float "
        f"model and {len(config.rows)} quantized ones, {calls:,} denoised images, compared with "
        f"{len(images):,} real images",
        "features": FEATURE_SPACES[section.features],
        "installed": f"missing: {', '.join(missing)}; the run would stop" if missing else "yes",
        "results": str(config.run_folder),
        "models": _models(config),
    }
    return Plan(f"tdq run {recipe}", lines)


def _correction(config: FullSizePTQConfig) -> str:
    section = config.correction
    titles = ", ".join(METHODS[name].title for name in section.methods)
    calls = section.denoised * config.evaluation.steps
    return f"{titles}: {calls:,} denoised images for each" if titles else "none"


def _models(config: FullSizePTQConfig) -> str:
    titles = ", ".join(METHODS[name].title for name in config.deployable_methods)
    if titles:
        return f"in models/, as the framework deploys them: {titles}"
    if not is_symmetric(config.weights):
        return "none: integer kernels take symmetric weights"
    reasons = [f"[{name!r}] {METHODS[name].obstacle}" for name in config.methods]
    return f"none: {'; '.join(reasons)}"
