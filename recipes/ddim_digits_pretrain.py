"""Train the small DDIM of the demo: a diffusers UNet2DModel on 16x16 MNIST digits."""

from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.pretraining import (
    PretrainingConfig,
    arguments_of,
    noise_loss,
    picture_of_samples,
    pretrain,
    write_figures,
)

__all__ = ["PretrainConfig", "run"]


class PretrainConfig(PretrainingConfig):
    """Configuration of `ddim-digits-pretrain`.

    Attributes:
        unet: Arguments of `diffusers.UNet2DModel`.
    """

    unet: Annotated[dict[str, Any], arguments_of(UNet2DModel)]


def run(config: PretrainConfig) -> Path:
    """Train, save `model/` (a DDIMPipeline), `loss.png` and `samples.png`; return the folder."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    unet, scheduler = UNet2DModel(**config.unet), DDIMScheduler(num_train_timesteps=1000)
    images, _ = load_digits(config.unet["sample_size"])

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (config.batch_size,), generator=generator)
        return noise_loss(unet, scheduler, images[index], generator)

    losses = pretrain(config, unet, loss_of)
    with atomic_folder(config.run_folder / "model") as temporary:
        DDIMPipeline(unet, scheduler).save_pretrained(temporary)
    samples = picture_of_samples(FloatModel(unet, scheduler), steps=20, seed=config.seed)
    write_figures(config.run_folder, losses, samples=samples)
    return config.run_folder
