"""How a reconstruction trains."""

from dataclasses import dataclass
from typing import get_args

from tdq_plugin.errors import ConfigError
from tdq_plugin.options import check_option
from tdq_plugin.reconstruct.blocks import Granularity

__all__ = ["ReconstructionConfig"]


@dataclass(frozen=True)
class ReconstructionConfig:
    """How scales are trained.

    Attributes:
        granularity: `block`: one residual or attention block after the other, each fed by the
            quantized blocks before it. `network`: all scales at once on the model's output.
        iterations: Adam steps for each block.
        batch_size: Samples in a step.
        learning_rate: Of the scales' parameters, decayed to zero by a cosine.
        zero_point_learning_rate: Of the zero points, in steps of the grid; 0 keeps them.
        seed: Seed of the batches.
        learn_rounding: Also learn whether each weight of the block is rounded up or down
            (AdaRound), and write the rounded weights into the layers.
        rounding_learning_rate: Of the rounding variables, constant. AdaRound's 1e-2 is meant for
            10 000 steps and more; a few hundred need a larger one.
        rounding_regularisation: Weight of the penalty that drives them to a decision.

    Raises:
        ConfigError: A number is not positive, or there is no such granularity.
    """

    granularity: Granularity = "network"
    iterations: int = 200
    batch_size: int = 32
    learning_rate: float = 3e-3
    zero_point_learning_rate: float = 3e-2
    seed: int = 0
    learn_rounding: bool = False
    rounding_learning_rate: float = 1e-1
    rounding_regularisation: float = 1e-2

    def __post_init__(self) -> None:
        rates = self.learning_rate, self.rounding_learning_rate, self.rounding_regularisation
        counts = self.iterations, self.batch_size
        if min(counts) < 1 or min(rates) <= 0 or self.zero_point_learning_rate < 0:
            raise ConfigError(f"{self} needs positive numbers.")
        check_option("granularity", self.granularity, get_args(Granularity))
