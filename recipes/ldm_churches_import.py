"""Import CompVis' LDM-8 of LSUN churches: from their checkpoint to a diffusers LDMPipeline."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import LDMPipeline

from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.compvis.architecture import churches_pipeline
from tdq_plugin.recipes.compvis.checkpoint import read_checkpoint
from tdq_plugin.recipes.compvis.weights import load_compvis
from tdq_plugin.recipes.config import RecipeConfig
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.run_state import check_new_folder

__all__ = ["ImportConfig", "plan", "run"]


class ImportConfig(RecipeConfig):
    """Configuration of `ldm-churches-import`.

    Attributes:
        checkpoint: CompVis' file, or its state dict as safetensors.
        ema: Take the moving average of the UNet's weights, which CompVis samples with.
    """

    checkpoint: Path
    ema: bool = True


def plan(config: ImportConfig, architecture: Callable[[], LDMPipeline] = churches_pipeline) -> Plan:
    """Read the checkpoint, and say what would be written."""
    pipeline = _imported(config, architecture)
    model = FloatModel(pipeline.unet, pipeline.scheduler, pipeline.vqvae)
    lines = {
        "checkpoint": str(config.checkpoint),
        "model": model.describe(),
        "weights": "moving average" if config.ema else "of the last step",
        "latents": f"multiplied by {pipeline.vqvae.config.scaling_factor:.6g}",
        "results": f"{config.run_folder}, {model.size_in_bytes / 1e9:.2f} GB",
    }
    return Plan("tdq run ldm-churches-import", lines)


def run(config: ImportConfig, architecture: Callable[[], LDMPipeline] = churches_pipeline) -> Path:
    """Write the pipeline; return its folder, which other recipes take as `model`."""
    pipeline = _imported(config, architecture)
    with atomic_folder(config.run_folder, marker="model_index.json") as temporary:
        pipeline.save_pretrained(temporary)
    return config.run_folder


def _imported(config: ImportConfig, architecture: Callable[[], LDMPipeline]) -> LDMPipeline:
    check_new_folder(config.run_folder)
    torch.set_num_threads(config.threads)
    tensors = read_checkpoint(config.checkpoint)
    pipeline = architecture()
    load_compvis(pipeline, tensors, config.ema)
    return pipeline
