"""Train the small DDIM of the demo: a diffusers UNet2DModel on 16x16 MNIST digits."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import Tensor

from tdq_plugin.files import atomic_folder
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.float_model import FloatModel
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.pretraining.config import PretrainingConfig
from tdq_plugin.recipes.pretraining.diffusion import BetaSchedule, noise_loss, picture_of_samples
from tdq_plugin.recipes.pretraining.figures import write_figures
from tdq_plugin.recipes.pretraining.networks import arguments_of, make_network, start_from
from tdq_plugin.recipes.pretraining.training import plan_of, pretrain

__all__ = ["PretrainConfig", "plan", "run"]

RECIPE = "ddim-digits-pretrain"


class PretrainConfig(PretrainingConfig):
    """Configuration of `ddim-digits-pretrain`.

    Attributes:
        beta_schedule: How the noise grows with t, by diffusers' name.
        start_from: Folder of a saved pipeline whose UNet the training starts from; null: from
            random weights.
        unet: Arguments of `diffusers.UNet2DModel`.
    """

    beta_schedule: BetaSchedule
    start_from: Path | None
    unet: Annotated[dict[str, Any], arguments_of(UNet2DModel)]


def plan(config: PretrainConfig) -> Plan:
    """Check network and checkpoint, and say what a run would do."""
    model, loss_of = _start(config)
    return plan_of(RECIPE, config, model.unet, loss_of)


def run(config: PretrainConfig) -> Path:
    """Train, save `model/` (a DDIMPipeline), `loss.png` and `samples.png`; return the folder."""
    model, loss_of = _start(config)
    losses = pretrain(config, model.unet, loss_of)
    with atomic_folder(config.run_folder / "model", marker="model_index.json") as temporary:
        DDIMPipeline(model.unet, model.scheduler).save_pretrained(temporary)
    samples = picture_of_samples(model, steps=20, seed=config.seed)
    write_figures(config.run_folder, losses, samples=samples)
    return config.run_folder


def _start(config: PretrainConfig) -> tuple[FloatModel, Callable[[torch.Generator], Tensor]]:
    """The untrained model, and its loss on the batch that a generator draws."""
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    unet = make_network("unet", UNet2DModel, config.unet)
    start_from(unet, config.start_from, config.checkpoint)
    model = FloatModel(unet, DDIMScheduler(beta_schedule=config.beta_schedule))
    images, _ = load_digits(model.image_shape[1])

    def loss_of(generator: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (config.batch_size,), generator=generator)
        return noise_loss(unet, model.scheduler, images[index], generator)

    return model, loss_of
