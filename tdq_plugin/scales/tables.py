"""Banks whose rows are free parameters: one for all t, or one for each group of timesteps."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.errors import ConfigError, TimestepError
from tdq_plugin.grid import QuantizationGrid
from tdq_plugin.scales.bank import TrainableBank

__all__ = ["ConstantBank", "LearnedTableBank"]


class LearnedTableBank(TrainableBank):
    """One free scale per group of timesteps and quantizer: the paper's "direct learning", Table 3.

    `groups == num_timesteps` is one scale per timestep (EfficientDM's TALSQ), fewer groups are
    APQ-DM's.

    Args:
        grids: The grid of each quantizer by its name.
        num_timesteps: Timesteps lie in `[0, num_timesteps)`.
        groups: Number of equal intervals of timesteps; each has its own scale.
        **options: As for `TrainableBank`.

    Raises:
        ConfigError: `groups` is not in `1 .. num_timesteps`.
    """

    def __init__(
        self,
        grids: Mapping[str, QuantizationGrid],
        num_timesteps: int = 1000,
        groups: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(grids, **options)
        self.num_timesteps = num_timesteps
        self.groups = num_timesteps if groups is None else groups
        if not 1 <= self.groups <= num_timesteps:
            raise ConfigError(f"groups = {groups} is not in 1 .. {num_timesteps}.")
        self.table = nn.Parameter(torch.zeros(len(self.names), self.groups, self.curves_per_row))

    def curves(self, timesteps: Tensor) -> Tensor:
        return self.table.index_select(1, self._group(timesteps))

    def fit(self, timesteps: Tensor, curves: Tensor) -> None:
        """Every group takes the value of the nearest given timestep."""
        width = self.num_timesteps / self.groups
        centres = (torch.arange(self.groups, device=self.device) + 0.5) * width - 0.5
        nearest = (centres[:, None] - timesteps[None, :]).abs().argmin(dim=1)
        with torch.no_grad():
            self.table.copy_(curves.index_select(1, nearest))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.groups} groups of {self.num_timesteps} timesteps"

    def _group(self, timesteps: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            low, high = float(timesteps.min()), float(timesteps.max())
            if low < 0 or high >= self.num_timesteps:
                raise TimestepError(
                    f"Timesteps {low:g} .. {high:g} are not within 0 .. {self.num_timesteps}. "
                    "Build the bank with a larger num_timesteps."
                )
        # Exact for whole timesteps, whatever the number of groups.
        return (timesteps.double() * self.groups / self.num_timesteps).long()


class ConstantBank(TrainableBank):
    """One learned scale per quantizer, whatever t is: LSQ, the static baseline."""

    def __init__(self, grids: Mapping[str, QuantizationGrid], **options: Any) -> None:
        super().__init__(grids, **options)
        self.curve = nn.Parameter(torch.zeros(len(self.names), 1, self.curves_per_row))

    def curves(self, timesteps: Tensor) -> Tensor:
        return self.curve.expand(-1, timesteps.shape[0], -1)

    def fit(self, timesteps: Tensor, curves: Tensor) -> None:
        """Start at the static scale: it comes from the values of all timesteps together."""
        nn.init.zeros_(self.curve)
