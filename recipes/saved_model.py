"""The folder that a recipe leaves for deployment."""

import shutil
from pathlib import Path
from typing import Any

from diffusers import DDIMScheduler, UNet2DModel
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.files import atomic_folder
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.output_correction import CORRECTION_FILE
from tdq_plugin.recipes.float_model import attention_heads
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.recipes.plan import parameter_bytes
from tdq_plugin.study.schema import SizeBytes

__all__ = ["save_model"]


def save_model(
    framework: Framework,
    model: nn.Module,
    folder: Path,
    unet: UNet2DModel,
    scheduler: DDIMScheduler,
    extra: dict[str, Any],
    correction: Path | None = None,
) -> SizeBytes:
    """Freeze a model for the scheduler's timesteps and no others, and save it.

    `int8` holds the quantized model, `unet` and `scheduler` the configurations to load it with.

    Args:
        framework: In whose form.
        model: The model, frozen for more timesteps or not at all.
        folder: Where to.
        unet: The float model.
        scheduler: The sampler, its timesteps set.
        extra: Noted in the file, beside the heads of the attentions, which `unet` cannot hold.
        correction: The model's output correction, to be saved with it.
    """
    tdq.load_scales(model.eval(), evaluate_table(tdq.scale_bank(model), scheduler))
    with atomic_folder(folder, marker="unet/config.json") as temporary:
        unet.save_config(temporary / "unet")
        scheduler.save_config(temporary / "scheduler")
        noted = {**extra, "attention_heads": attention_heads(unet)}
        framework.save(model.cpu(), temporary / "int8", noted)
        if correction is not None:
            shutil.copy(correction, temporary / CORRECTION_FILE)
    return {"float32": parameter_bytes(unet), "int8": _folder_bytes(folder)}


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
