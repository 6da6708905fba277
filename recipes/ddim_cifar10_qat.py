"""Train the CIFAR-10 DDIM with quantization, as in the TDQ paper (arXiv 2306.02316).

What is decided here: all layers but the first and the last are quantized, dropout is that of the
float model's training, and of all weights the averaged ones with the five lowest validation losses
are judged. The numbers are in the configuration: DDPM's loss on the training data, the float
model's learning rate, 200,000 steps in batches of 128, and 50,000 samples by 200 DDIM steps.
"""

from pathlib import Path

import torch

from tdq_plugin.recipes.calibration import placeholder
from tdq_plugin.recipes.evaluation.image_quality import FEATURE_SPACES, require_features
from tdq_plugin.recipes.float_model import load_float_model
from tdq_plugin.recipes.frameworks import load_framework
from tdq_plugin.recipes.image_data import load_images
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.qat.best_checkpoints import BestCheckpoints
from tdq_plugin.recipes.qat.config import FullSizeConfig
from tdq_plugin.recipes.qat.full_size import (
    calibration_batch,
    judge_best,
    plan_of,
    prepare_method,
    train_best,
)
from tdq_plugin.recipes.qat.stages import start

__all__ = ["CifarQATConfig", "plan", "run"]

RECIPE = "ddim-cifar10-qat"


class CifarQATConfig(FullSizeConfig):
    """Configuration of `ddim-cifar10-qat`."""


def plan(config: CifarQATConfig) -> Plan:
    """Check model and data, and say what a run would do."""
    torch.set_num_threads(config.threads)
    model = load_float_model(config.model)
    points = placeholder(model)
    quantized = prepare_method(config, load_framework(config.adapter), model, points)
    return plan_of(RECIPE, config, model, quantized)


def run(config: CifarQATConfig) -> Path:
    """Run or resume the recipe; return the folder with `results.json` and `model/`."""
    require_features(config.evaluation.features)
    run = start(config)
    run.accelerator.print(f"Features: {FEATURE_SPACES[config.evaluation.features]}")
    with run.accelerator.main_process_first():
        images, held_out = load_images(config.data, run.model.image_shape)
    batch = calibration_batch(run, images)
    quantized = prepare_method(config, run.framework, run.model, batch)
    best = BestCheckpoints(run.state.folder / "weights", config.validation.keep)
    train_best(run, quantized, images, held_out, best)
    judge_best(RECIPE, run, quantized, best)
    run.accelerator.end_training()
    return run.state.folder
