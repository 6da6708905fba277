"""Train a float network from scratch: one loop with checkpoints, for all pretraining recipes."""

import json
import math
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from statistics import mean
from typing import Any, Literal, TypeVar

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from tqdm.auto import tqdm

from tdq_plugin.errors import ConfigError
from tdq_plugin.files import atomic_file
from tdq_plugin.recipes.checkpoints import check_settings, load_checkpoint, save_checkpoint
from tdq_plugin.recipes.config import RecipeConfig
from tdq_plugin.recipes.evaluation.sampling import sample, scheduler_with
from tdq_plugin.recipes.float_model import FloatModel, load_float_model
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.run_state import RunState, check_folder
from tdq_plugin.study.figures import loss_curve, sample_grid

__all__ = [
    "BetaSchedule",
    "PretrainingConfig",
    "arguments_of",
    "make_network",
    "noise_loss",
    "picture_of_samples",
    "plan_of",
    "pretrain",
    "start_from",
    "write_figures",
]


Network = TypeVar("Network", bound=nn.Module)
# As diffusers names them: DDPM's, and the cosine of improved DDPM (arXiv 2102.09672, section 3.2).
BetaSchedule = Literal["linear", "squaredcos_cap_v2"]
# What diffusers and torch raise at sizes that do not fit together.
_MISFITS = (TypeError, ValueError, RuntimeError, AttributeError)


class PretrainingConfig(RecipeConfig):
    """What every pretraining recipe takes.

    Attributes:
        iterations: Optimizer steps.
        batch_size: Images in a step.
        learning_rate: Peak of the cosine schedule.
        warmup: Steps until the peak.
        ema_decay: Largest decay of the weight average that is saved.
        checkpoint_every: Steps between checkpoints; a restart continues from the last one.
    """

    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    warmup: int = Field(ge=0)
    ema_decay: float = Field(gt=0, lt=1)
    checkpoint_every: int = Field(gt=0)

    @property
    def changeable(self) -> frozenset[str]:
        """Settings that may change while a run goes on; threads change the last bits."""
        return super().changeable | {"threads", "checkpoint_every"}


def arguments_of(network: type[nn.Module]) -> AfterValidator:
    """A pydantic validator: a dict has arguments of a network, and no others."""
    known = signature(network).parameters

    def check(values: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(values.keys() - known.keys())
        if unknown:
            raise ValueError(f"{network.__name__} takes no {unknown}, but {', '.join(known)}")
        return values

    return AfterValidator(check)


def make_network(key: str, network: type[Network], arguments: dict[str, Any]) -> Network:
    """Build a network of a configuration.

    Args:
        key: Of the arguments in the configuration, for the message.
        network: Its class.
        arguments: Of the class.

    Raises:
        ConfigError: They do not fit together.
    """
    try:
        return network(**arguments)
    except _MISFITS as error:
        raise ConfigError(f"{key}: {network.__name__} cannot be built: {error}") from error


def start_from(unet: UNet2DModel, model: Path | None) -> None:
    """Take the weights of a saved pipeline's UNet; without one, keep the random ones.

    Raises:
        ConfigError: There is no such pipeline, or its UNet has other shapes.
    """
    if model is None:
        return
    trained = load_float_model(model, "start_from").unet
    try:
        unet.load_state_dict(trained.state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"start_from = {str(model)!r} has a UNet of other shapes than `unet`: "
            f"{str(error).splitlines()[1].strip()}"
        ) from error


class Training:
    """Everything that a checkpoint has to restore."""

    def __init__(self, config: PretrainingConfig, model: nn.Module) -> None:
        self.config, self.model = config, model
        self.average = EMAModel(
            model.parameters(), decay=config.ema_decay, use_ema_warmup=True, power=0.75
        )
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
        self.schedule = get_cosine_schedule_with_warmup(
            self.optimizer, config.warmup, config.iterations
        )
        self.step = 0
        self.losses: list[float] = []

    def advance(self, loss_of: Callable[[torch.Generator], Tensor]) -> None:
        """One optimizer step. Every draw is a function of (seed, step), so a restart is exact.

        Raises:
            ConfigError: The loss or its gradient is not finite.
        """
        draw = self.config.seed * 1_000_003 + self.step
        # For what the network itself draws: dropout.
        torch.manual_seed(draw)
        generator = torch.Generator().manual_seed(draw)
        loss = loss_of(generator)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        value, length = float(loss.detach()), float(norm)
        if not math.isfinite(value + length):
            raise ConfigError(
                f"The training loss is {value} at step {self.step + 1}, the norm of its gradient "
                f"{length}. Lower learning_rate."
            )
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        self.losses.append(value)
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "config": json.dumps(self.config.model_dump(mode="json")),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "losses": self.losses,
        }

    def save(self, path: Path) -> None:
        save_checkpoint(path, self.state())

    def load(self, path: Path) -> None:
        state = load_checkpoint(path)
        if state is None:
            return
        settings = self.config.model_dump(mode="json")
        check_settings(path, state["config"], settings, self.config.changeable)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.losses = state["step"], state["losses"]


def plan_of(
    recipe: str,
    config: PretrainingConfig,
    model: nn.Module,
    loss_of: Callable[[torch.Generator], Tensor],
) -> Plan:
    """Check network, data and checkpoint, and say what a run would do.

    Raises:
        ConfigError: As `pretrain`.
    """
    check_folder(config.run_folder, config.model_dump(mode="json"), config.changeable)
    training = Training(config, model)
    training.load(config.run_folder / "checkpoint.pt")
    _check_loss(model, loss_of)
    size = sum(parameter.numel() for parameter in model.parameters())
    done = f", {training.step:,} are done" if training.step else ""
    lines = {
        "network": f"{type(model).__name__}, {size:,} parameters",
        "steps": f"{config.iterations:,} in batches of {config.batch_size}{done}",
        "results": str(config.run_folder),
    }
    return Plan(f"tdq run {recipe}", lines)


def _check_loss(model: nn.Module, loss_of: Callable[[torch.Generator], Tensor]) -> None:
    """See that the network takes the digits, before a training starts.

    Raises:
        ConfigError: It does not.
    """
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            loss_of(torch.Generator().manual_seed(0))
    except _MISFITS as error:
        raise ConfigError(f"{type(model).__name__} does not take the digits: {error}") from error


def pretrain(
    config: PretrainingConfig, model: nn.Module, loss_of: Callable[[torch.Generator], Tensor]
) -> list[float]:
    """Train or go on training; the model ends in evaluation mode with averaged weights.

    Args:
        config: How; `checkpoint.pt` is in its run folder.
        model: The network, initialised by the caller.
        loss_of: Its loss on the batch that a generator draws.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: The folder is another run's, the checkpoint was written with other settings or
            is damaged, the network does not take the digits, or the loss is not finite.
    """
    settings = config.model_dump(mode="json")
    check_folder(config.run_folder, settings, config.changeable)
    checkpoint = config.run_folder / "checkpoint.pt"
    training = Training(config, model)
    training.load(checkpoint)
    _check_loss(model, loss_of)
    progress = tqdm(total=config.iterations, initial=training.step, desc="pretrain", mininterval=10)
    while training.step < config.iterations:
        training.advance(loss_of)
        progress.update()
        if training.step % config.checkpoint_every == 0:
            progress.set_postfix(loss=f"{mean(training.losses[-500:]):.4f}")
            RunState(config.run_folder, settings, config.changeable)
            training.save(checkpoint)
    progress.close()
    RunState(config.run_folder, settings, config.changeable)
    training.average.copy_to(model.parameters())
    model.eval()
    return training.losses


def noise_loss(
    unet: UNet2DModel, scheduler: DDIMScheduler, clean: Tensor, generator: torch.Generator
) -> Tensor:
    """DDPM's loss (Ho et al., arXiv 2006.11239, eq. 14) of clean samples `(B, C, H, W)`."""
    noise = torch.randn(clean.shape, generator=generator)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(clean),), generator=generator)
    noisy = scheduler.add_noise(clean, noise, timesteps)
    return mse_loss(unet(noisy, timesteps, return_dict=False)[0], noise)


def picture_of_samples(model: FloatModel, steps: int, seed: int) -> bytes:
    """64 samples of a trained model as a PNG."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(64, *model.latent_shape, generator=generator)
    scheduler = scheduler_with(model.scheduler, steps)
    images = sample(model.denoise, scheduler, noise, decode=model.decode)
    rows = {
        f"samples {16 * row + 1} to {16 * row + 16}": images[16 * row :][:16] for row in range(4)
    }
    return sample_grid(rows, columns=16)


def write_figures(folder: Path, losses: list[float], **pictures: bytes) -> None:
    """Write `loss.png`, and PNG pictures by name."""
    for name, png in {"loss": loss_curve(losses), **pictures}.items():
        with atomic_file(folder / f"{name}.png") as temporary:
            temporary.write_bytes(png)
