"""The frozen bank: rows of a table, found by the value of t."""

from typing import Literal, get_args

import torch
from torch import Tensor

from tdq_plugin.errors import LookupRuleError
from tdq_plugin.options import check_option
from tdq_plugin.scales.bank import ScaleBank
from tdq_plugin.table import ScaleTable

__all__ = ["FrozenBank", "Lookup"]

Lookup = Literal["exact", "nearest", "linear"]


class FrozenBank(ScaleBank):
    """Scales and zero points as float32 buffers `(T, L)`; one `index_select` a forward.

    Args:
        table: The scales, timesteps ascending.
        lookup: `exact`: t must be in the table. `nearest`: the row nearest to t. `linear`: scales
            between two rows are interpolated, zero points come from the nearest row. A t outside
            the table is an error under every rule.

    Raises:
        ConfigError: There is no such lookup rule.
    """

    timesteps: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, table: ScaleTable, lookup: Lookup = "exact") -> None:
        super().__init__(table.grids)
        check_option("lookup", lookup, get_args(Lookup))
        self.lookup: Lookup = lookup
        self.register_buffer("timesteps", table.timesteps.clone())
        self.register_buffer("scales", table.scales.clone())
        self.register_buffer("zero_points", table.zero_points.clone())

    @property
    def device(self) -> torch.device:
        return self.scales.device

    @property
    def table(self) -> ScaleTable:
        """The rows as a `ScaleTable`."""
        grids = dict(zip(self.names, self.grids, strict=True))
        return ScaleTable(grids, self.timesteps, self.scales, self.zero_points)

    def rows(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        if self.lookup == "linear":
            return self._interpolate(timesteps)
        return self.select(self.index(timesteps))

    def select(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points `(L, B)` of the rows with the given indices `(B,)`."""
        scale = self.scales.index_select(0, index).T
        if self.zero_points.shape[0] == 1:
            return scale, self.zero_points.T.expand_as(scale)
        return scale, self.zero_points.index_select(0, index).T

    def index(self, timesteps: Tensor) -> Tensor:
        """Row of each timestep, shape `(B,)`, by the rule `exact` or `nearest`.

        Raises:
            LookupRuleError: A timestep is outside the table, or not in it under `exact`.
        """
        last = self.timesteps.shape[0] - 1
        above = torch.searchsorted(self.timesteps, timesteps).clamp(max=last)
        below = (above - 1).clamp(min=0)
        # Distances, for the middle of two neighbouring floats is one of them.
        is_below = timesteps - self.timesteps[below] <= self.timesteps[above] - timesteps
        nearest = torch.where(is_below, below, above)
        if self.lookup == "exact":
            self._check(self.timesteps[nearest] == timesteps, timesteps)
        else:
            self._check_range(timesteps)
        return nearest

    def _interpolate(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        zero_point = self.select(self.index(timesteps))[1]
        last = self.timesteps.shape[0] - 1
        above = torch.searchsorted(self.timesteps, timesteps).clamp(min=min(1, last), max=last)
        below = (above - 1).clamp(min=0)
        low, high = self.timesteps[below], self.timesteps[above]
        weight = torch.where(high > low, (timesteps - low) / (high - low), torch.zeros_like(low))
        scale = torch.lerp(self.scales[below].T, self.scales[above].T, weight)
        return scale, zero_point

    def _check_range(self, timesteps: Tensor) -> None:
        inside = (timesteps >= self.timesteps[0]) & (timesteps <= self.timesteps[-1])
        self._check(inside, timesteps)

    def _check(self, valid: Tensor, timesteps: Tensor) -> None:
        if torch.compiler.is_compiling():
            torch._assert_async(valid.all(), "A timestep is not in the frozen scale table.")
        elif not bool(valid.all()):
            raise LookupRuleError(self._complaint(timesteps[~valid].tolist()))

    def _complaint(self, wrong: list[float]) -> str:
        low, high = float(self.timesteps[0]), float(self.timesteps[-1])
        shown = ", ".join(f"{t:g}" for t in wrong[:5])
        remedy = "Freeze with the timesteps that the sampler visits"
        if self.lookup == "exact":
            remedy += ", or choose lookup='nearest' or 'linear' for timesteps in between"
        else:
            remedy += ": between the first and the last of them, this rule finds a scale"
        return (
            f"Timestep {shown} is not in the frozen table of {len(self.timesteps)} timesteps "
            f"({low:g} .. {high:g}, lookup={self.lookup!r}). {remedy}."
        )
