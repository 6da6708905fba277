"""The methods that the PTQ recipes compare: each is a scale bank and a way to set it."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from tdq_plugin.errors import ConfigError
from tdq_plugin.ranges import RangeMethod
from tdq_plugin.recipes.frameworks import Framework
from tdq_plugin.recipes.ptq.weights import WeightChoice, is_symmetric
from tdq_plugin.reconstruct import TimestepDistribution
from tdq_plugin.scales import PAPER, ConstantBank, GeneratorBank, LearnedTableBank, TrainableBank

__all__ = [
    "METHODS",
    "Method",
    "check_framework",
    "covers_trained_methods",
    "known_methods",
]


@dataclass(frozen=True)
class Method:
    """One row of the report.

    Attributes:
        title: Name in tables and figures.
        description: One sentence for the report.
        bank: Makes the scale bank.
        ranges: How calibrated ranges become scales.
        warm_start: Whether the bank starts from the ranges of each timestep.
        trained: Whether reconstruction trains the bank.
        dynamic: Whether scales come from each input at run time instead of a bank.
        moves_zero_points: Whether the bank gives each timestep a zero point of its own.
        weights: Ranges of the weights, if not those of the run.
        timesteps: How much each timestep counts in a range that all of them share.
    """

    title: str
    description: str
    bank: Callable[..., TrainableBank]
    ranges: RangeMethod = "mse"
    warm_start: bool = False
    trained: bool = False
    dynamic: bool = False
    moves_zero_points: bool = False
    weights: WeightChoice | None = None
    timesteps: TimestepDistribution = "uniform"

    @property
    def obstacle(self) -> str | None:
        """What keeps the method from being deployed on integer kernels; None if nothing does."""
        if self.dynamic:
            return "have no table to deploy"
        if self.weights is not None and not is_symmetric(self.weights):
            return "have weights with zero points, which integer kernels do not take"
        return None


METHODS = {
    "minmax": Method(
        "MinMax",
        "One scale per layer that covers every calibration value.",
        ConstantBank,
        ranges="minmax",
    ),
    "mse": Method("static MSE", "One scale per layer with the least rounding error.", ConstantBank),
    "ptq4dm": Method(
        "PTQ4DM",
        "As static MSE, with timesteps in the middle counting more, and weights with zero points "
        "that range from the least to the largest (Shang et al., 2211.15736). Simulated only.",
        ConstantBank,
        weights="asymmetric_minmax",
        timesteps="normal",
    ),
    "lsq": Method(
        "static LSQ",
        "One trained scale per layer, LSQ gradients (Esser et al., 1902.08153).",
        ConstantBank,
        trained=True,
    ),
    "timestep_minmax": Method(
        "per-timestep MinMax",
        "One untrained scale per layer and sampler step that covers the values of that step.",
        LearnedTableBank,
        ranges="minmax",
        warm_start=True,
    ),
    "learned_table": Method(
        "learned table",
        "One trained scale per layer and timestep, each free of the others.",
        LearnedTableBank,
        warm_start=True,
        trained=True,
    ),
    "tdq_paper": Method(
        "TDQ, paper preset",
        "Generators with the paper's encoding, softplus and He initialisation.",
        partial(GeneratorBank, config=PAPER),
        trained=True,
    ),
    "tdq": Method(
        "TDQ",
        "Trained generators with this package's defaults, frozen into a table.",
        GeneratorBank,
        warm_start=True,
        trained=True,
    ),
    "tdq_zero_point": Method(
        "TDQ, zero point of t",
        "TDQ whose generators give each layer a zero point for each timestep, too.",
        partial(GeneratorBank, timestep_zero_point=True),
        warm_start=True,
        trained=True,
        moves_zero_points=True,
    ),
    "dynamic": Method(
        "dynamic",
        "A scale from each image's own minimum and maximum, computed at run time.",
        ConstantBank,
        dynamic=True,
    ),
}

Names = TypeVar("Names", bound=Collection[str])


def known_methods(names: Names) -> Names:
    """Check names of a configuration.

    Raises:
        ValueError: Some are no methods; pydantic makes it an error of the configuration.
    """
    unknown = sorted(set(names) - set(METHODS))
    if unknown:
        raise ValueError(f"{unknown} are no methods; choose from {list(METHODS)}")
    return names


def check_framework(names: Collection[str], framework: Framework, adapter: str) -> None:
    """See that the framework can do what the methods ask of it.

    Raises:
        ConfigError: Zero points move with t, and the framework's are constant; or a method has
            weights of its own, and the framework sets their ranges itself.
    """
    moving = [name for name in names if METHODS[name].moves_zero_points]
    if moving and not framework.moves_zero_points:
        raise ConfigError(
            f"adapter = {adapter!r} deploys constant zero points, and those of {moving} move with "
            "t. Leave these methods out, or choose adapter=torch_ao."
        )
    # Such ranges, as learned rounding, need this package's weight quantizer.
    own = [name for name in names if METHODS[name].weights is not None]
    if own and not framework.learns_rounding:
        raise ConfigError(
            f"adapter = {adapter!r} sets the ranges of weights itself, and {own} have their own. "
            "Leave these methods out, or choose adapter=torch_ao."
        )


def covers_trained_methods(training: Names, used: Collection[str]) -> Names:
    """Check that a configuration says how the trained ones of the used methods are trained.

    Raises:
        ValueError: Some have no entry.
    """
    missing = sorted(name for name in used if METHODS[name].trained and name not in training)
    if missing:
        raise ValueError(
            f"{missing} are trained and have no entry; add "
            f"training.{missing[0]}={{learning_rate: 3e-3, weight_at_zero: 0.25}}"
        )
    return training
