"""Train the autoencoder of the latent digits model: a small diffusers AutoencoderKL."""

from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.pretraining import PretrainingConfig, arguments_of, pretrain, write_figures
from tdq_plugin.study.figures import sample_grid

__all__ = ["AutoencoderConfig", "run"]


class AutoencoderConfig(PretrainingConfig):
    """Configuration of `ldm-digits-autoencoder`.

    Attributes:
        kl_weight: Of the mean divergence of a latent value from the standard normal distribution,
            beside the mean squared error of a pixel.
        autoencoder: Arguments of `diffusers.AutoencoderKL`.
    """

    kl_weight: float = Field(ge=0)
    autoencoder: Annotated[dict[str, Any], arguments_of(AutoencoderKL)]


def run(config: AutoencoderConfig) -> Path:
    """Train, save `model/`, `loss.png` and `reconstructions.png`; return the folder."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    autoencoder = AutoencoderKL(**config.autoencoder)
    images, _ = load_digits(config.autoencoder["sample_size"])

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (config.batch_size,), generator=generator)
        encoded = autoencoder.encode(images[index]).latent_dist
        decoded = autoencoder.decode(encoded.sample(generator)).sample
        divergence = encoded.kl() / encoded.mean[0].numel()
        return mse_loss(decoded, images[index]) + config.kl_weight * divergence.mean()

    losses = pretrain(config, autoencoder, loss_of)
    autoencoder.register_to_config(scaling_factor=1 / _spread(autoencoder, images))
    with atomic_folder(config.run_folder / "model") as temporary:
        autoencoder.save_pretrained(temporary)
    write_figures(config.run_folder, losses, reconstructions=_picture(autoencoder, images))
    return config.run_folder


@torch.no_grad()
def _spread(autoencoder: AutoencoderKL, images: Tensor) -> float:
    """Standard deviation of all latent values: divided by it, they suit a diffusion process."""
    latents = [autoencoder.encode(part).latent_dist.mean for part in images.split(500)]
    return float(torch.cat(latents).std())


@torch.no_grad()
def _picture(autoencoder: AutoencoderKL, images: Tensor) -> bytes:
    originals = images[:: len(images) // 16][:16]
    decoded = autoencoder.decode(autoencoder.encode(originals).latent_dist.mean).sample
    return sample_grid({"digits": originals, "decoded": decoded}, columns=16)
