"""The frozen bank in operators that every exported graph has: a row by the value of t."""

import math

import torch
from torch import Tensor, nn

from tdq_plugin.adapters.brevitas.proxy import TDQActQuantProxy
from tdq_plugin.freeze import evaluate_table, frozen_bank
from tdq_plugin.scales import ScaleBank
from tdq_plugin.table import ScaleTable

__all__ = ["LookupBank", "exported_table"]


class LookupBank(ScaleBank):
    """Compares t with every timestep of a table; the scales of a t that is not in it are NaN.

    A graph cannot raise. By NaN scales the output becomes NaN, which nobody takes for an image.

    Args:
        table: The scales.
    """

    timesteps: Tensor
    row_numbers: Tensor
    scales: Tensor
    zero_points: Tensor

    def __init__(self, table: ScaleTable) -> None:
        super().__init__(table.grids)
        # Row 0 is that of unknown timesteps. Its zero points are codes: NaN is no integer.
        scales = torch.cat([torch.full_like(table.scales[:1], torch.nan), table.scales])
        zero_points = table.zero_points
        if len(zero_points) > 1:
            zero_points = torch.cat([zero_points[:1], zero_points])
        self.register_buffer("timesteps", table.timesteps)
        self.register_buffer("row_numbers", torch.arange(1, len(scales)))
        self.register_buffer("scales", scales)
        self.register_buffer("zero_points", zero_points)

    @property
    def device(self) -> torch.device:
        return self.scales.device

    def rows(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Scales `(L, B)`; zero points alike, or `(L, 1)` if t does not move them.

        Those stay constants of the graph.
        """
        index = ((timesteps[:, None] == self.timesteps) * self.row_numbers).sum(1)
        scales = self.scales.index_select(0, index).T
        if len(self.zero_points) == 1:
            return scales, self.zero_points.T
        return scales, self.zero_points.index_select(0, index).T


def exported_table(model: nn.Module) -> ScaleTable:
    """The scales that a frozen model uses, at every timestep that its lookup rule covers.

    Under the rules `nearest` and `linear`, these are the integers between the first and the last
    timestep of the table.

    Raises:
        AdapterError: The model is not attached, or not frozen.
    """
    bank = frozen_bank(model, "an export")
    table = bank.table
    if bank.lookup != "exact":
        low, high = float(table.timesteps[0]), float(table.timesteps[-1])
        between = range(math.ceil(low), math.floor(high) + 1)
        table = evaluate_table(bank, [*table.timesteps.tolist(), *between])
    return ScaleTable(table.grids, table.timesteps, _restricted(model, table), table.zero_points)


def _restricted(model: nn.Module, table: ScaleTable) -> Tensor:
    """The scales that are used where the table has these: powers of two, if that was asked for."""
    proxies = [module for module in model.modules() if isinstance(module, TDQActQuantProxy)]
    quantizers = {
        proxy.tdq_tensor_quant.quantizer.name: proxy.tdq_tensor_quant for proxy in proxies
    }
    columns = zip(table.names, table.scales.unbind(1), strict=True)
    with torch.no_grad():
        return torch.stack([quantizers[name].restricted(column) for name, column in columns], 1)
