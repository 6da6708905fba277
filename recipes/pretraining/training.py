"""One training loop with checkpoints, for all pretraining recipes."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.checkpoints import check_settings, load_checkpoint, save_checkpoint
from tdq_plugin.recipes.plan import Plan
from tdq_plugin.recipes.pretraining.config import PretrainingConfig
from tdq_plugin.recipes.pretraining.networks import MISFITS
from tdq_plugin.recipes.run_state import RunState, check_folder

__all__ = ["Training", "plan_of", "pretrain"]


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
    training.load(config.checkpoint)
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
    except MISFITS as error:
        raise ConfigError(f"{type(model).__name__} does not take the digits: {error}") from error


def pretrain(
    config: PretrainingConfig, model: nn.Module, loss_of: Callable[[torch.Generator], Tensor]
) -> list[float]:
    """Train or go on training; the model ends in evaluation mode with averaged weights.

    Args:
        config: How, and where its checkpoint is.
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
    training = Training(config, model)
    training.load(config.checkpoint)
    _check_loss(model, loss_of)
    progress = tqdm(total=config.iterations, initial=training.step, desc="pretrain", mininterval=10)
    while training.step < config.iterations:
        training.advance(loss_of)
        progress.update()
        if training.step % config.checkpoint_every == 0 or training.step == config.iterations:
            progress.set_postfix(loss=f"{mean(training.losses[-500:]):.4f}")
            RunState(config.run_folder, settings, config.changeable)
            training.save(config.checkpoint)
    progress.close()
    training.average.copy_to(model.parameters())
    model.eval()
    return training.losses
