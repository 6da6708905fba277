"""The float model of a recipe: a diffusers pipeline with a UNet2DModel, from a folder or a hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DModel
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor

from tdq_plugin.errors import ConfigError

__all__ = ["FloatModel", "load_float_model", "set_dropout"]


@dataclass(frozen=True)
class FloatModel:
    """A denoiser that predicts noise, and the DDIM sampler of its diffusion process."""

    unet: UNet2DModel
    scheduler: DDIMScheduler

    @torch.no_grad()
    def denoise(self, x: Tensor, t: Any) -> Tensor:
        """The noise in `x`, on the device of `x`."""
        predicted: Tensor = self.unet(x.to(self.unet.device), t, return_dict=False)[0]
        return predicted.to(x.device)


def load_float_model(name: str | Path) -> FloatModel:
    """Load a pipeline.

    Args:
        name: Folder of a saved pipeline, or a repository of the Hugging Face hub.

    Raises:
        ConfigError: There is no such pipeline, its network is no UNet2DModel, or it predicts
            something else than the noise.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(str(name))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model = {str(name)!r} is neither the folder of a saved diffusers pipeline nor a "
            f"repository that can be downloaded ({str(error).splitlines()[0]})."
        ) from error
    unet = getattr(pipeline, "unet", None)
    if not isinstance(unet, UNet2DModel):
        raise ConfigError(
            f"model = {str(name)!r} is a {type(pipeline).__name__} with a {type(unet).__name__}; "
            "this recipe takes a pipeline with a UNet2DModel, such as google/ddpm-cifar10-32."
        )
    predicts = pipeline.scheduler.config.prediction_type
    if predicts != "epsilon":
        raise ConfigError(
            f"model = {str(name)!r} predicts {predicts!r}; this recipe takes models that predict "
            "the noise (prediction_type='epsilon')."
        )
    return FloatModel(unet.eval(), DDIMScheduler.from_config(pipeline.scheduler.config))


def set_dropout(unet: UNet2DModel, probability: float) -> None:
    """Set the dropout of the residual blocks, as the model had it when it was trained."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.dropout.p = probability
