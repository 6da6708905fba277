"""Training in the PTQ recipes: reconstruction brings the quantized model to the float one."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, PositiveFloat
from torch import Tensor, nn
from tqdm.auto import tqdm

from tdq_plugin.errors import ConfigError
from tdq_plugin.recipes.config import Section
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.reconstruct import (
    CalibrationSet,
    Granularity,
    Progress,
    ReconstructionConfig,
    reconstruct,
)

__all__ = ["MethodTraining", "ReconstructionSection", "TrainingSection", "train"]


@dataclass(frozen=True)
class MethodTraining:
    """How one method is trained, and the weight of the error at t = 0."""

    reconstruction: ReconstructionConfig
    weight_at_zero: float


class TrainingSection(Section):
    """How one method is trained: learning rate, and weight of the error at t = 0.

    Zero points learn ten times as fast.
    """

    learning_rate: PositiveFloat
    weight_at_zero: float = Field(ge=0)


class ReconstructionSection(Section):
    """The training that `lsq`, `learned_table` and the `tdq` methods share."""

    granularity: Granularity
    iterations: int = Field(gt=0)
    batch_size: int = Field(gt=0)

    def check(self, framework: Framework, adapter: str) -> None:
        """See that the framework's models can be trained like this.

        Raises:
            ConfigError: They have no blocks.
        """
        if self.granularity == "block" and not framework.has_blocks:
            raise ConfigError(
                f"reconstruction.granularity = 'block': models of adapter = {adapter!r} are no "
                "graphs, so they have no blocks. Set it to 'network'."
            )

    def of(self, method: TrainingSection, learn_rounding: bool, seed: int) -> MethodTraining:
        """How one method is trained."""
        reconstruction = ReconstructionConfig(
            self.granularity,
            self.iterations,
            self.batch_size,
            learning_rate=method.learning_rate,
            zero_point_learning_rate=10 * method.learning_rate,
            seed=seed,
            learn_rounding=learn_rounding,
        )
        return MethodTraining(reconstruction, method.weight_at_zero)


def train(
    model: nn.Module,
    data: CalibrationSet,
    config: ReconstructionConfig,
    weighting: Callable[[Tensor], Tensor],
    checkpoint: Path,
    title: str,
    reference: nn.Module,
) -> None:
    """`reconstruct` with a progress bar.

    Args:
        model: With the scales that training starts from.
        data: Calibration data.
        config: How.
        weighting: Of the samples' errors.
        checkpoint: Where an interrupted training goes on from.
        title: Of the progress bar.
        reference: The float model.
    """
    with tqdm(desc=f"{title}: scales", unit="step") as progress:

        def show(now: Progress) -> None:
            progress.total = now.steps
            progress.set_postfix(block=now.block, loss=f"{now.loss:.2e}", refresh=False)
            progress.update(now.step - progress.n)

        reconstruct(model, data, config, weighting, checkpoint, show, reference)
