"""What `--dry-run` of a PTQ recipe that compares methods prints."""

import torch

import tdq_plugin as tdq
from tdq_plugin.recipes.calibration import placeholder
from tdq_plugin.recipes.evaluation.digits_evaluation import check_measurable
from tdq_plugin.recipes.evaluation.sampling import scheduler_with
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.ptq.comparison import check_unseen
from tdq_plugin.recipes.ptq.config import PTQConfig
from tdq_plugin.recipes.ptq.estimates import calibration_samples, describe_memory, training_steps
from tdq_plugin.recipes.ptq.methods import METHODS, check_framework
from tdq_plugin.recipes.run_state import check_folder

__all__ = ["plan_of"]


def plan_of(recipe: str, config: PTQConfig) -> Plan:
    """Check run folder, framework and model, and say what a run would do."""
    check_folder(config.run_folder, config.model_dump(mode="json"), config.changeable)
    torch.set_num_threads(config.threads)
    framework = load_framework(config.adapter)
    learn_rounding = config.learns_rounding(framework)
    check_framework(config.methods, framework, config.adapter)
    config.reconstruction.check(framework, config.adapter)
    model = load_float_model(config.model)
    scheduler_with(model.scheduler, config.steps)
    check_measurable(model)
    check_unseen(config, model)
    samples = calibration_samples(config.calibration, config.steps, model.latent_shape)
    points = placeholder(model)
    quantized = framework.prepare(model.unet, points, config.widths)
    tdq.calibrate(quantized, points.batches(2), samples=16, warm_start=False)
    section = config.reconstruction
    trained = [METHODS[name].title for name in config.methods if METHODS[name].trained]
    rows = len(config.int8_methods) + len(config.fake_methods) + len(config.correction.methods)
    lines = {
        "model": f"{config.model}, {model.describe()}",
        "quantizers": f"{len(tdq.scale_bank(quantized).names)} activations, {config.bits}, by "
        f"{config.adapter}, rounding of weights {'learned' if learn_rounding else 'to nearest'}",
        "methods": ", ".join(METHODS[name].title for name in config.methods),
        "calibration": f"{samples:,} samples of {config.calibration.images} trajectories of "
        f"{config.steps} DDIM steps",
        "steps": f"{training_steps(section, quantized):,} in batches of {section.batch_size} for "
        f"each of: {', '.join(trained)}",
        "memory": describe_memory(section, learn_rounding, samples, quantized, points),
        "evaluation": f"{config.evaluation.samples:,} images by {config.steps} DDIM steps in each "
        f"of {rows} rows",
        "results": str(config.run_folder),
    }
    return Plan(f"tdq run {recipe}", lines)
