"""The methods of quantization-aware training: a scale bank, and what training sees of rounding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

import tdq_plugin as tdq
from tdq_plugin.calibrate import initialise_scales
from tdq_plugin.errors import ConfigError
from tdq_plugin.observe import Observation
from tdq_plugin.quantizer import Estimator
from tdq_plugin.scales import (
    PAPER,
    ConstantBank,
    GeneratorBank,
    GeneratorConfig,
    LearnedTableBank,
    TrainableBank,
)
from tdq_plugin.weights import WeightQuantizer

__all__ = ["METHODS", "QATMethod", "apply_method", "calibrate_bank", "check_methods"]


@dataclass(frozen=True)
class QATMethod:
    """One row of a report.

    Attributes:
        title: Name in tables and figures.
        description: One sentence for the report.
        bank: Makes the scale bank.
        estimator: How training sees the rounding of activations.
        warm_start: Whether the bank starts from the ranges of each timestep.
        dynamic: Whether scales come from each input at run time; then only the weights learn.
    """

    title: str
    description: str
    bank: Callable[..., TrainableBank]
    estimator: Estimator = "lsq"
    warm_start: bool = False
    dynamic: bool = False


METHODS = {
    "lsq": QATMethod(
        "static LSQ",
        "One learned scale per layer, LSQ gradients (Esser et al., 1902.08153).",
        ConstantBank,
    ),
    "pact": QATMethod(
        "PACT",
        "One learned clipping limit per layer (Choi et al., 1805.06085); weights by LSQ.",
        ConstantBank,
        estimator="pact",
    ),
    "nipq": QATMethod(
        "NIPQ",
        "One learned scale per layer, trained with noise instead of rounding, in activations and "
        "weights (Shin et al., 2306.00820), at fixed bits.",
        ConstantBank,
        estimator="nipq",
    ),
    "table_1": QATMethod(
        "table, 1 group",
        "Direct learning with one group of timesteps: LSQ, started and trained as the tables are.",
        partial(LearnedTableBank, groups=1),
    ),
    "table_10": QATMethod(
        "table, 10 groups",
        "One learned scale per layer and interval of 100 timesteps.",
        partial(LearnedTableBank, groups=10),
        warm_start=True,
    ),
    "table_100": QATMethod(
        "table, 100 groups",
        "One learned scale per layer and interval of 10 timesteps.",
        partial(LearnedTableBank, groups=100),
        warm_start=True,
    ),
    "learned_table": QATMethod(
        "learned table",
        "One learned scale per layer and timestep, each free of the others (S = 1000).",
        LearnedTableBank,
        warm_start=True,
    ),
    "tdq": QATMethod(
        "TDQ",
        "Generators with this package's defaults, LSQ gradients.",
        GeneratorBank,
        warm_start=True,
    ),
    **{
        f"tdq_depth_{depth}": QATMethod(
            f"TDQ, depth {depth}",
            f"TDQ with generators of {depth} linear layer{'s' if depth > 1 else ''} instead of 4.",
            partial(GeneratorBank, config=GeneratorConfig(depth=depth)),
            warm_start=True,
        )
        for depth in (1, 2, 3, 5, 6)
    },
    "tdq_paper": QATMethod(
        "TDQ, paper preset",
        "Generators with the paper's encoding, softplus and He initialisation, LSQ gradients.",
        partial(GeneratorBank, config=PAPER),
    ),
    "tdq_pact": QATMethod(
        "TDQ on PACT",
        "Generators that are trained as PACT's clipping limits.",
        GeneratorBank,
        estimator="pact",
        warm_start=True,
    ),
    "tdq_nipq": QATMethod(
        "TDQ on NIPQ",
        "Generators that are trained with NIPQ's noise instead of rounding.",
        GeneratorBank,
        estimator="nipq",
        warm_start=True,
    ),
    "dynamic": QATMethod(
        "dynamic",
        "A scale from each image's own minimum and maximum; only the weights are trained.",
        ConstantBank,
        dynamic=True,
    ),
}


def check_methods(names: Sequence[str], model: nn.Module, adapter: str) -> None:
    """See that methods can be trained on a prepared model.

    Raises:
        ConfigError: They cannot.
    """
    noisy = [name for name in names if METHODS[name].estimator == "nipq"]
    if noisy and not any(isinstance(module, WeightQuantizer) for module in model.modules()):
        others = ", ".join(name for name in names if name not in noisy)
        raise ConfigError(
            f"{noisy} add noise to weights, and {adapter} rounds weights itself. "
            f"Choose others, such as {others or 'lsq, tdq'}."
        )


def apply_method(model: nn.Module, method: QATMethod) -> None:
    """Give an attached model the bank and the estimators of a method; not calibrated yet."""
    previous = tdq.scale_bank(model)
    bank = method.bank(dict(zip(previous.names, previous.grids, strict=True)))
    tdq.set_scale_bank(model, bank.requires_grad_(not method.dynamic))
    for _, quantizer in tdq.named_quantizers(model):
        quantizer.estimator = method.estimator
        quantizer.mode = "dynamic" if method.dynamic else "quantize"
    for module in model.modules():
        if isinstance(module, WeightQuantizer):
            module.noise_in_training = method.estimator == "nipq"


def calibrate_bank(
    model: nn.Module, method: QATMethod, observations: dict[str, Observation]
) -> None:
    """Start the model's bank from what calibration has seen."""
    initialise_scales(tdq.scale_bank(model), observations, warm_start=method.warm_start)
