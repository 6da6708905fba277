"""Train the LDM-8 of LSUN churches with quantization, as in the TDQ paper (arXiv 2306.02316).

What is decided here: the UNet is quantized but for its first and last layer, the autoencoder stays
float and encodes each batch, and of all weights the averaged ones with the five lowest validation
losses are judged by decoded samples. The numbers are in the configuration: the mean absolute error
and the learning rate that the float model was trained with, 200,000 steps in batches of 32, and the
FID of 50,000 samples by 200 DDIM steps.
"""

from pathlib import Path

import torch
from pydantic import Field
from torch import nn

from tdq_plugin.recipes.calibration import placeholder
from tdq_plugin.recipes.evaluation.image_quality import FEATURE_SPACES, require_features
from tdq_plugin.recipes.float_model import FloatModel, load_float_model, set_attention_heads
from tdq_plugin.recipes.frameworks import Framework, load_framework
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
from tdq_plugin.reconstruct import CalibrationSet

__all__ = ["ChurchesQATConfig", "plan", "quantize", "run"]

RECIPE = "ldm-churches-qat"


class ChurchesQATConfig(FullSizeConfig):
    """Configuration of `ldm-churches-qat`.

    Attributes:
        attention_heads: Of every attention, see `float_model.set_attention_heads`; null: as the
            pipeline's own configuration has them.
    """

    attention_heads: int | None = Field(gt=0)


def plan(config: ChurchesQATConfig) -> Plan:
    """Check model and data, and say what a run would do."""
    torch.set_num_threads(config.threads)
    model = load_float_model(config.model)
    points = placeholder(model)
    quantized = quantize(config, load_framework(config.adapter), model, points)
    return plan_of(RECIPE, config, model, quantized)


def run(config: ChurchesQATConfig) -> Path:
    """Run or resume the recipe; return the folder with `results.json` and `model/`."""
    require_features(config.evaluation.features)
    run = start(config)
    run.accelerator.print(f"Features: {FEATURE_SPACES[config.evaluation.features]}")
    with run.accelerator.main_process_first():
        images, held_out = load_images(config.data, run.model.image_shape)
    batch = calibration_batch(run, images)
    quantized = quantize(config, run.framework, run.model, batch)
    best = BestCheckpoints(run.state.folder / "weights", config.validation.keep)
    train_best(run, quantized, images, held_out, best)
    judge_best(RECIPE, run, quantized, best)
    run.accelerator.end_training()
    return run.state.folder


def quantize(
    config: ChurchesQATConfig, framework: Framework, model: FloatModel, data: CalibrationSet
) -> nn.Module:
    """A copy of the UNet that trains with quantization, with the method's scale bank."""
    if config.attention_heads is not None:
        set_attention_heads(model.unet, config.attention_heads)
    return prepare_method(config, framework, model, data)
