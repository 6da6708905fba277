"""The bank that quantizers ask for in their names: `tdq_bank`, `tdq_width` and so on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tdq_plugin.errors import ConfigError
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.options import check_option
from tdq_plugin.scales import ConstantBank, GeneratorBank, GeneratorConfig, LearnedTableBank
from tdq_plugin.scales.bank import TrainableBank

__all__ = ["BankChoice", "BankKind", "choose_bank"]

BankKind = Literal["generator", "learned_table", "constant"]


def _generators(grids: Mapping[str, QuantizationGrid], **options: Any) -> GeneratorBank:
    return GeneratorBank(grids, GeneratorConfig(**options))


_BANKS: dict[BankKind, tuple[Callable[..., TrainableBank], tuple[str, ...]]] = {
    "generator": (_generators, ("width", "depth", "num_timesteps")),
    "learned_table": (LearnedTableBank, ("groups", "num_timesteps")),
    "constant": (ConstantBank, ()),
}


@dataclass(frozen=True)
class BankChoice:
    """A kind of bank and its size; `tdq_plugin.attach` calls it with the grids.

    Attributes:
        kind: Generators (TDQ), a learned table, or one scale for all timesteps.
        options: Names and values; those that are left out have the bank's own defaults.

    Raises:
        ConfigError: The kind is unknown, or has no such option.
    """

    kind: BankKind
    options: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        check_option("tdq_bank", self.kind, _BANKS)
        _, known = _BANKS[self.kind]
        for name, value in self.options:
            if name not in known:
                shown = ", ".join(f"tdq_{option}" for option in known) or "no size"
                raise ConfigError(
                    f"tdq_{name} = {value} says nothing to tdq_bank = {self.kind!r}, "
                    f"which takes {shown}."
                )

    def __call__(self, grids: Mapping[str, QuantizationGrid]) -> TrainableBank:
        make, _ = _BANKS[self.kind]
        return make(grids, **dict(self.options))


def choose_bank(kind: BankKind | None, **options: int | None) -> BankChoice | None:
    """The choice that the names of a quantizer make; None if they are all None."""
    given = tuple((name, value) for name, value in options.items() if value is not None)
    if kind is None and not given:
        return None
    return BankChoice(kind or "generator", given)
