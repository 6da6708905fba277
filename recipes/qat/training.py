"""Quantization-aware training: the optimizer, one step, and what a restart needs.

The loop itself is in the recipes. Accelerate runs it on one device or on several processes.
"""

import json
import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from pydantic import Field, field_validator
from torch import Tensor, nn

import tdq_plugin as tdq
from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.checkpoints import check_settings, load_checkpoint, save_checkpoint
from tdq_plugin.recipes.config import Section
from tdq_plugin.recipes.objectives import Objective
from tdq_plugin.weights import WeightQuantizer

__all__ = ["StepResult", "Training", "TrainingSection", "parameter_groups"]


class TrainingSection(Section):
    """How a quantized model is trained.

    Attributes:
        iterations: Optimizer steps.
        batch_size: Samples in a step, over all processes together.
        learning_rate: Of the network's parameters; usually the float model's.
        weight_scale_learning_rate: Of the logarithms of the weights' scales.
        weight_decay: Of the network's parameters.
        schedule: `constant_with_warmup`, or `cosine` down to zero.
        warmup: Steps until the full learning rate.
        range_decay: Weight of PACT's penalty, the sum of the squared clipping ranges (section 3).
        ema_decay: Largest decay of the average of all parameters; 0 keeps the last ones.
        max_gradient_norm: Gradients are clipped to it.
        mixed_precision: `bf16` computes convolutions and products in bfloat16.
        checkpoint_every: Steps between checkpoints; a restart continues from the last one.
        log_every: Steps between records of the log.
    """

    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    learning_rate: float = Field(gt=0)
    weight_scale_learning_rate: float = Field(gt=0)
    weight_decay: float = Field(ge=0)
    schedule: Literal["constant_with_warmup", "cosine"]
    warmup: int = Field(ge=0)
    range_decay: float = Field(ge=0)
    ema_decay: float = Field(ge=0, lt=1)
    max_gradient_norm: float = Field(gt=0)
    mixed_precision: Literal["no", "bf16"] = "no"
    checkpoint_every: int = Field(gt=0)
    log_every: int = Field(gt=0)

    @field_validator("mixed_precision", mode="before")
    @classmethod
    def _no_is_a_text(cls, value: Any) -> Any:
        # YAML reads a bare `no` as false.
        return "no" if value is False else value


class StepResult(NamedTuple):
    """Loss of a step, averaged over the processes, and the norm of its gradient before clipping."""

    loss: float
    gradient_norm: float


class Training:
    """A quantized model on its way: everything that a checkpoint has to restore.

    Args:
        model: The attached model.
        accelerator: Runs the steps.
        section: How to train.
        scale_learning_rate: Of the scale bank; zero points learn ten times as fast.
        identity: What a checkpoint belongs to, for example the recipe's configuration.
        seed: Of what the model itself draws: dropout, NIPQ's noise.
        changeable: Parts of the identity that a restart may change, by dotted key.

    Raises:
        ConfigError: The processes cannot share the batch evenly.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Accelerator,
        section: TrainingSection,
        scale_learning_rate: float,
        identity: dict[str, Any],
        seed: int,
        changeable: Collection[str] = (),
    ) -> None:
        self.model, self.accelerator, self.section, self.seed = model, accelerator, section, seed
        self.identity, self.changeable = identity, changeable
        self.step = 0
        groups = parameter_groups(model, section, scale_learning_rate)
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        self.schedule = get_scheduler(
            section.schedule,
            self.optimizer,
            num_warmup_steps=section.warmup,
            num_training_steps=section.iterations,
        )
        self.average = EMAModel(model.parameters(), decay=section.ema_decay)
        self.parallel: nn.Module | None = None
        if section.batch_size % accelerator.num_processes:
            raise ConfigError(
                f"training.batch_size = {section.batch_size} cannot be shared by "
                f"{accelerator.num_processes} processes."
            )

    def advance(self, objective: Objective) -> StepResult | None:
        """One optimizer step; the result at steps that are logged.

        Raises:
            ConfigError: The loss is not finite; it is looked at where it is logged, and before a
                checkpoint, so that none holds broken weights.
        """
        accelerator, parameters = self.accelerator, list(self.model.parameters())
        # Restarted or not, dropout and NIPQ's noise are those of this step.
        draw = self.seed * 1_000_003 + self.step
        torch.manual_seed(draw * accelerator.num_processes + accelerator.process_index)
        batch = objective.batch(self.step, self._part(), accelerator.device)
        loss = objective.loss(self._parallel_model(), batch) + self._range_penalty(batch.timesteps)
        accelerator.backward(loss)
        norm = accelerator.clip_grad_norm_(parameters, self.section.max_gradient_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.step(parameters)
        self.step += 1
        logged = self.step % self.section.log_every == 0 or self.step == self.section.iterations
        if not logged and self.step % self.section.checkpoint_every:
            return None
        result = self._result(loss.detach(), norm)
        return result if logged else None

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """For a while, the model has the averaged parameters and is in evaluation mode."""
        self.average.store(self.model.parameters())
        self.average.copy_to(self.model.parameters())
        try:
            yield self.model.eval()
        finally:
            self.average.restore(self.model.parameters())

    @torch.no_grad()
    def validation_loss(self, objective: Objective, batches: int) -> float:
        """Mean loss of the averaged model over the first batches of an objective."""
        total = torch.zeros((), device=self.accelerator.device)
        with self.averaged() as model:
            for index in range(batches):
                batch = objective.batch(index, self._part(), self.accelerator.device)
                total += objective.loss(model, batch)
        return float(self.accelerator.reduce(total, "mean")) / batches

    def save(self, path: Path) -> None:
        """Write a checkpoint; the main process alone does."""
        if self.accelerator.is_main_process:
            save_checkpoint(path, self._state())

    def resume(self, path: Path) -> bool:
        """Continue from a checkpoint, if there is one.

        Raises:
            ConfigError: It was written with other settings, or is damaged.
        """
        state = load_checkpoint(path, self.accelerator.device)
        if state is None:
            return False
        check_settings(path, state["identity"], self.identity, self.changeable)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step = state["step"]
        return True

    def finish(self) -> nn.Module:
        """Take the model back from Accelerate, with the averaged parameters, in float32."""
        if self.parallel is not None:
            self.accelerator.unwrap_model(self.parallel, keep_fp32_wrapper=False)
            self.accelerator.free_memory()
        self.average.copy_to(self.model.parameters())
        return self.model.eval()

    def _state(self) -> dict[str, Any]:
        return {
            "identity": json.dumps(self.identity),
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
        }

    def _part(self) -> slice:
        """The part of the global batch that this process computes."""
        size = self.section.batch_size // self.accelerator.num_processes
        start = self.accelerator.process_index * size
        return slice(start, start + size)

    def _parallel_model(self) -> nn.Module:
        # Wrapped late, so that checkpoints are loaded into the model itself.
        if self.parallel is None:
            self.parallel = self.accelerator.prepare_model(self.model)
        return self.parallel.train()

    def _range_penalty(self, timesteps: Tensor) -> Tensor | float:
        bank = tdq.scale_bank(self.model)
        estimators = {quantizer.estimator for _, quantizer in tdq.named_quantizers(self.model)}
        if "pact" not in estimators or self.section.range_decay == 0:
            return 0.0
        steps = torch.tensor([grid.quant_max - grid.quant_min for grid in bank.grids])
        ranges = bank(timesteps)[0] * steps.to(bank.device)[:, None]
        return self.section.range_decay * ranges.square().mean(dim=1).sum()

    def _result(self, loss: Tensor, norm: Tensor | None) -> StepResult:
        value = float(self.accelerator.reduce(loss, "mean"))
        length = float(norm) if norm is not None else 0.0
        if not math.isfinite(value + length):
            raise ConfigError(
                f"The training loss is {value} at step {self.step}, the norm of its gradient "
                f"{length}. Lower the learning rates."
            )
        return StepResult(value, length)


def parameter_groups(
    model: nn.Module, section: TrainingSection, scale_learning_rate: float
) -> list[dict[str, Any]]:
    """Learning rates by role: network, weights' scales, scale bank, zero points."""
    bank = tdq.scale_bank(model)
    zero_point = bank.get_parameter("zero_point")
    curves = [p for p in bank.parameters() if p is not zero_point]
    ratios = [m.log_ratio for m in model.modules() if isinstance(m, WeightQuantizer)]
    special = {zero_point, *curves, *ratios}
    network = [p for p in model.parameters() if p not in special]
    groups = (
        (network, section.learning_rate, section.weight_decay),
        (ratios, section.weight_scale_learning_rate, 0.0),
        (curves, scale_learning_rate, 0.0),
        ([zero_point], 10 * scale_learning_rate, 0.0),
    )
    return [{"params": p, "lr": rate, "weight_decay": decay} for p, rate, decay in groups]
