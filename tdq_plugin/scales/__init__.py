"""Scale banks: what turns a timestep into the scales of all quantizers."""

from tdq_plugin.scales.bank import ScaleBank, TrainableBank
from tdq_plugin.scales.frozen import FrozenBank, Lookup
from tdq_plugin.scales.generator import DEFAULT, PAPER, GeneratorBank, GeneratorConfig
from tdq_plugin.scales.tables import ConstantBank, LearnedTableBank

__all__ = [
    "DEFAULT",
    "PAPER",
    "ConstantBank",
    "FrozenBank",
    "GeneratorBank",
    "GeneratorConfig",
    "LearnedTableBank",
    "Lookup",
    "ScaleBank",
    "TrainableBank",
]
