"""What every pretraining recipe takes."""

from pathlib import Path

from pydantic import Field

from tdq_plugin.recipes.config import RecipeConfig

__all__ = ["PretrainingConfig"]


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
    def checkpoint(self) -> Path:
        """The file from which a restart goes on."""
        return self.run_folder / "checkpoint.pt"

    @property
    def changeable(self) -> frozenset[str]:
        """Settings that may change while a run goes on; threads change the last bits."""
        return super().changeable | {"threads", "checkpoint_every"}
