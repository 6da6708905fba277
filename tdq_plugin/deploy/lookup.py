"""The one module of an int8 model that sees the timestep."""

from typing import Any

import torch
from torch import Tensor, nn

from tdq_plugin.deploy.activations import QuantizerRow, int8_shift, uint8_shift
from tdq_plugin.deploy.timestep_values import TimestepValues
from tdq_plugin.errors import ScaleError
from tdq_plugin.scales.frozen import FrozenBank

__all__ = ["TimestepLookup"]

_Found = tuple[list[QuantizerRow], Tensor | None]

# Enough for the steps of one sampler; a list of rows takes about 0.6 kB a quantizer.
_REMEMBERED_TIMESTEPS = 256


class TimestepLookup(nn.Module):
    """The rows of all quantizers, and the tabulated values of the timestep path.

    The rows of a timestep are remembered, so that a sampler that visits it again for the next
    image pays as little as static quantization does. A table whose rows are all the same is
    static quantization; its one list of rows is made once.

    Args:
        bank: Scales and zero points.
        values: The tabulated timestep path, if it is cached.
    """

    def __init__(self, bank: FrozenBank, values: TimestepValues | None) -> None:
        super().__init__()
        self.bank, self.values = bank, values
        self._remembered: dict[float, _Found] = {}
        self._static_rows: list[QuantizerRow] | None = None
        self._is_static: bool | None = None

    def forward(self, timesteps: Tensor, sample: Tensor) -> tuple[list[QuantizerRow], list[Tensor]]:
        """Look a timestep up.

        Args:
            timesteps: Float32, shape `(B,)`, as `as_timesteps` gives it.
            sample: The model's input; its dimension 0 is the batch.

        Returns:
            A row per quantizer, with scales of shape `()` if the whole batch has one timestep;
            and the cached values, each with the batch as dimension 0.

        Raises:
            LookupRuleError: A timestep is not covered by the table.
            ScaleError: There are neither one timestep nor as many as samples.
        """
        if self._is_static is None:
            self._prepare()
        if len(timesteps) not in (1, sample.shape[0]):
            raise ScaleError(
                f"{len(timesteps)} timesteps were given for {sample.shape[0]} samples. Give one, "
                "or one for each sample."
            )
        if len(timesteps) > 1 and bool((timesteps == timesteps[0]).all()):
            timesteps = timesteps[:1]
        rows, index = self._find(timesteps)
        if self.values is None or index is None:
            return rows, []
        return rows, self.values(index, sample.shape[0])

    def _find(self, timesteps: Tensor) -> _Found:
        if len(timesteps) > 1:
            return self._look_up(timesteps)
        timestep = timesteps.item()
        found = self._remembered.get(timestep)
        if found is None:
            if len(self._remembered) == _REMEMBERED_TIMESTEPS:
                self._remembered.clear()
            found = self._remembered[timestep] = self._look_up(timesteps)
        return found

    def _look_up(self, timesteps: Tensor) -> _Found:
        # First of all, for a timestep outside of the table is an error whatever the rows are.
        index = self.bank.index(timesteps)
        if self.bank.lookup == "linear":
            return self._static_rows or self._rows(*self.bank.rows(timesteps)), None
        return self._static_rows or self._rows(*self.bank.select(index)), index

    def _rows(self, scales: Tensor, zero_points: Tensor) -> list[QuantizerRow]:
        if self.bank.zero_points.shape[0] == 1:
            zero_points = self.bank.zero_points.T
        grids = self.bank.grids
        to_int8 = torch.tensor([[float(int8_shift(grid))] for grid in grids])
        to_uint8 = torch.tensor([[float(uint8_shift(grid))] for grid in grids])
        offsets = _unbound(zero_points - to_int8)
        codes = _unbound((zero_points + to_uint8).to(torch.int32))
        return list(map(QuantizerRow, _unbound(scales), _unbound(1 / scales), offsets, codes))

    def _prepare(self) -> None:
        scales, zero_points = self.bank.scales.T, self.bank.zero_points.T
        self._is_static = zero_points.shape[1] == 1 and bool((scales == scales[:, :1]).all())
        if self._is_static:
            self._static_rows = self._rows(scales[:, :1], zero_points)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, **self._nothing_known()}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.__dict__.update(self._nothing_known())
        super()._load_from_state_dict(*args, **kwargs)

    @staticmethod
    def _nothing_known() -> dict[str, Any]:
        return {"_remembered": {}, "_static_rows": None, "_is_static": None}


def _unbound(table: Tensor) -> tuple[Tensor, ...]:
    """One tensor per row of a table `(L, B)`: shape `()` for one timestep, else `(B,)`."""
    return table.reshape(-1).unbind() if table.shape[1] == 1 else table.unbind()
