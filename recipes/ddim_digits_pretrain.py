"""Train the small DDIM of the demo: a diffusers UNet2DModel on 16x16 MNIST digits."""

import json
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from pydantic import Field
from torch import Tensor
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file, atomic_folder
from tdq_plugin.recipes.config import RecipeConfig
from tdq_plugin.recipes.digits import load_digits
from tdq_plugin.recipes.sampling import sample, scheduler_with
from tdq_plugin.study.figures import loss_curve, sample_grid

__all__ = ["PretrainConfig", "run"]


class PretrainConfig(RecipeConfig):
    """Configuration of `ddim-digits-pretrain`.

    Attributes:
        iterations: Optimizer steps.
        batch_size: Images in a step.
        learning_rate: Peak of the cosine schedule.
        warmup: Steps until the peak.
        ema_decay: Largest decay of the weight average that is saved.
        checkpoint_every: Steps between checkpoints; a restart continues from the last one.
        unet: Arguments of `diffusers.UNet2DModel`.
    """

    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(ge=0)
    ema_decay: float = Field(gt=0, lt=1)
    checkpoint_every: int = Field(gt=0)
    unet: dict[str, Any]


class Training:
    """Everything that a checkpoint has to restore."""

    def __init__(self, config: PretrainConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.model = UNet2DModel(**config.unet)
        self.average = EMAModel(
            self.model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75
        )
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, fused=True
        )
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, config.warmup, config.iterations
        )
        self.step = 0
        self.losses: list[float] = []

    def state(self) -> dict[str, Any]:
        return {
            "config": json.dumps(self.config.model_dump(mode="json"), sort_keys=True),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }

    def save(self, path: Path) -> None:
        with atomic_file(path) as temporary:
            torch.save(self.state(), temporary)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["config"] != self.state()["config"]:
            raise ConfigError(
                f"{path} was written with another configuration: {state['config']}. "
                "Choose another name=... or remove the run folder."
            )
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.losses = state["step"], state["losses"]


def run(config: PretrainConfig) -> Path:
    """Train, save `model/` (a DDIMPipeline), `loss.png` and `samples.png`; return the folder."""
    torch.set_num_threads(config.threads)
    folder = config.run_folder
    checkpoint = folder / "checkpoint.pt"
    training = Training(config)
    if checkpoint.exists():
        training.load(checkpoint)
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    images, _ = load_digits(config.unet["sample_size"])
    progress = tqdm(total=config.iterations, initial=training.step, desc="pretrain", mininterval=10)
    while training.step < config.iterations:
        training.losses.append(train_step(training, images, scheduler))
        training.step += 1
        progress.update()
        if training.step % config.checkpoint_every == 0:
            progress.set_postfix(loss=f"{mean(training.losses[-500:]):.4f}")
            training.save(checkpoint)
    training.average.copy_to(training.model.parameters())
    with atomic_folder(folder / "model") as temporary:
        DDIMPipeline(training.model, scheduler).save_pretrained(temporary)
    _write_figures(training, scheduler, folder)
    return folder


def _write_figures(training: Training, scheduler: DDIMScheduler, folder: Path) -> None:
    channels, size = training.model.config.in_channels, training.model.config.sample_size
    generator = torch.Generator().manual_seed(training.config.seed)
    noise = torch.randn(64, channels, size, size, generator=generator)
    model = training.model.eval()
    images = sample(
        lambda x, t: model(x, t, return_dict=False)[0], scheduler_with(scheduler, 20), noise
    )
    rows = {
        f"samples {16 * row + 1} to {16 * row + 16}": images[16 * row :][:16] for row in range(4)
    }
    figures = {
        "samples.png": sample_grid(rows, columns=16),
        "loss.png": loss_curve(training.losses),
    }
    for name, png in figures.items():
        with atomic_file(folder / name) as temporary:
            temporary.write_bytes(png)


def train_step(training: Training, images: Tensor, scheduler: DDIMScheduler) -> float:
    """One optimizer step. Every draw is a function of (seed, step), so a restart is exact."""
    config = training.config
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + training.step)
    index = torch.randint(len(images), (config.batch_size,), generator=generator)
    clean = images[index]
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(1000, (config.batch_size,), generator=generator)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    loss = mse_loss(training.model(noisy, timesteps, return_dict=False)[0], noise)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(training.model.parameters(), 1.0)
    training.optimizer.step()
    training.schedule.step()
    training.optimizer.zero_grad()
    training.average.step(training.model.parameters())
    return float(loss.detach())
