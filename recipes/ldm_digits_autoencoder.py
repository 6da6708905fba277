"""Train the autoencoder of the latent digits model: a small diffusers AutoencoderKL."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss

from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.pretraining.config import PretrainingConfig
from tdq_plugin.recipes.pretraining.figures import write_figures
from tdq_plugin.recipes.pretraining.networks import arguments_of, make_network
from tdq_plugin.recipes.pretraining.training import plan_of, pretrain
from tdq_plugin.study.figures import sample_grid

__all__ = ["AutoencoderConfig", "plan", "run"]

RECIPE = "ldm-digits-autoencoder"


class AutoencoderConfig(PretrainingConfig):
    """Configuration of `ldm-digits-autoencoder`.

    Attributes:
        kl_weight: Of the mean divergence of a latent value from the standard normal distribution,
            beside the mean squared error of a pixel.
        autoencoder: Arguments of `diffusers.AutoencoderKL`.
    """

    kl_weight: float = Field(ge=0)
    autoencoder: Annotated[dict[str, Any], arguments_of(AutoencoderKL)]


def plan(config: AutoencoderConfig) -> Plan:
    """Check network and checkpoint, and say what a run would do."""
    autoencoder, _, loss_of = _start(config)
    return plan_of(RECIPE, config, autoencoder, loss_of)


def run(config: AutoencoderConfig) -> Path:
    """Train, save `model/`, `loss.png` and `reconstructions.png`; return the folder."""
    autoencoder, images, loss_of = _start(config)
    losses = pretrain(config, autoencoder, loss_of)
    autoencoder.register_to_config(scaling_factor=1 / _spread(autoencoder, images))
    with atomic_folder(config.run_folder / "model", marker="config.json") as temporary:
        autoencoder.save_pretrained(temporary)
    write_figures(config.run_folder, losses, reconstructions=_picture(autoencoder, images))
    return config.run_folder


def _start(
    config: AutoencoderConfig,
) -> tuple[AutoencoderKL, Tensor, Callable[[torch.Generator], Tensor]]:
    """The untrained network, the digits, and the loss on the batch that a generator draws."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    autoencoder = make_network("autoencoder", AutoencoderKL, config.autoencoder)
    images, _ = load_digits(autoencoder.config.sample_size)

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (config.batch_size,), generator=generator)
        encoded = autoencoder.encode(images[index]).latent_dist
        decoded = autoencoder.decode(encoded.sample(generator)).sample
        divergence = encoded.kl() / encoded.mean[0].numel()
        return mse_loss(decoded, images[index]) + config.kl_weight * divergence.mean()

    return autoencoder, images, loss_of


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
