"""Train the small latent diffusion model: a UNet2DModel on the latents of 32x32 MNIST digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel
from torch import Tensor

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.config import ASSETS
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.pretraining.config import PretrainingConfig
from tdq_plugin.recipes.pretraining.diffusion import BetaSchedule, noise_loss, picture_of_samples
from tdq_plugin.recipes.pretraining.figures import write_figures
from tdq_plugin.recipes.pretraining.networks import arguments_of, make_network, start_from
from tdq_plugin.recipes.pretraining.training import plan_of, pretrain

__all__ = ["LatentPretrainConfig", "plan", "run"]

RECIPE = "ldm-digits-pretrain"
AUTOENCODER = ASSETS / "ldm-digits" / "vqvae"


class LatentPretrainConfig(PretrainingConfig):
    """Configuration of `ldm-digits-pretrain`.

    Attributes:
        autoencoder: Folder of a trained AutoencoderKL, `model/` in the results of
            `ldm-digits-autoencoder`.
        beta_schedule: How the noise grows with t, by diffusers' name.
        start_from: Folder of a saved pipeline whose UNet the training starts from; null: from
            random weights.
        unet: Arguments of `diffusers.UNet2DModel`.
    """

    autoencoder: Path = AUTOENCODER
    beta_schedule: BetaSchedule
    start_from: Path | None
    unet: Annotated[dict[str, Any], arguments_of(UNet2DModel)]


def plan(config: LatentPretrainConfig) -> Plan:
    """Check autoencoder, network and checkpoint, and say what a run would do."""
    model, loss_of = _start(config)
    return plan_of(RECIPE, config, model.unet, loss_of)


def run(config: LatentPretrainConfig) -> Path:
    """Train, save `model/` (an LDMPipeline), `loss.png` and `samples.png`; return the folder."""
    model, loss_of = _start(config)
    losses = pretrain(config, model.unet, loss_of)
    with atomic_folder(config.run_folder / "model", marker="model_index.json") as temporary:
        LDMPipeline(model.autoencoder, model.unet, model.scheduler).save_pretrained(temporary)
    samples = picture_of_samples(model, steps=20, seed=config.seed)
    write_figures(config.run_folder, losses, samples=samples)
    return config.run_folder


def _start(config: LatentPretrainConfig) -> tuple[FloatModel, Callable[[torch.Generator], Tensor]]:
    """The untrained model, and its loss on the batch that a generator draws."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    unet = make_network("unet", UNet2DModel, config.unet)
    start_from(unet, config.start_from, config.checkpoint)
    # Latents have no natural limits, so the sampler must not clip them.
    scheduler = DDIMScheduler(beta_schedule=config.beta_schedule, clip_sample=False)
    model = FloatModel(unet, scheduler, _load_autoencoder(config.autoencoder))
    images, _ = load_digits(model.image_shape[1])
    latents = torch.cat([model.encode(part) for part in images.split(500)])

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (config.batch_size,), generator=generator)
        return noise_loss(unet, scheduler, latents[index], generator)

    return model, loss_of


def _load_autoencoder(folder: Path) -> AutoencoderKL:
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"autoencoder = {str(folder)!r} is no folder of a saved autoencoder. "
            "Train one: tdq run ldm-digits-autoencoder."
        )
    return AutoencoderKL.from_pretrained(folder).eval().requires_grad_(False)
