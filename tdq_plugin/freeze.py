"""`freeze`: turn the generators into a table. Only the scale bank of the model changes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdq_plugin.attach import scale_bank
from tdq_plugin.errors import AdapterError, TableMismatchError, TimestepError
from tdq_plugin.scales.bank import ScaleBank, TrainableBank
from tdq_plugin.scales.frozen import FrozenBank, Lookup
from tdq_plugin.table import ScaleTable, check_names, load_table, timesteps_tensor

__all__ = ["evaluate_table", "freeze", "frozen_bank", "load_scales", "resolve_timesteps"]

Model = TypeVar("Model", bound=nn.Module)


def freeze(model: Model, timesteps: Any, lookup: Lookup = "exact") -> Model:
    """Replace the model's scale bank by a table of its rows; in place.

    Args:
        model: An attached model.
        timesteps: A count (0 .. count - 1), a sequence or tensor of timesteps, or a diffusers
            scheduler, whose `timesteps` are taken.
        lookup: What happens for a t between the timesteps: an error (`exact`), the `nearest` row,
            or `linear` interpolation of the scales.

    Returns:
        The model.

    Raises:
        AdapterError: The model is not attached, or frozen already.
        TimestepError: `timesteps` is none of the above, or empty.
    """
    bank = scale_bank(model)
    if not isinstance(bank, TrainableBank):
        raise AdapterError(
            f"The model's bank is a {type(bank).__name__}: it is frozen already. "
            "To train again, give it a trainable bank by tdq_plugin.set_scale_bank(model, bank) "
            "and calibrate."
        )
    model.scale_bank = FrozenBank(evaluate_table(bank, timesteps), lookup)
    return model


def frozen_bank(model: nn.Module, product: str) -> FrozenBank:
    """The table of a frozen model.

    Args:
        model: The model.
        product: What is made from the table, for the message.

    Raises:
        AdapterError: The model is not attached, or not frozen.
    """
    bank = scale_bank(model)
    if not isinstance(bank, FrozenBank):
        raise AdapterError(
            f"The model's scale bank is a {type(bank).__name__}, and {product} holds a table. "
            "Call tdq_plugin.freeze(model, timesteps) first."
        )
    return bank


def evaluate_table(bank: ScaleBank, timesteps: Any) -> ScaleTable:
    """Evaluate a bank at all given timesteps at once; the rows of the table are bit-equal to it."""
    steps = resolve_timesteps(timesteps).to(bank.device)
    with torch.no_grad():
        scales, zero_points = bank.rows(steps)
    zeros = zero_points.T.contiguous()
    if bool((zeros == zeros[:1]).all()):
        zeros = zeros[:1].clone()
    grids = dict(zip(bank.names, bank.grids, strict=True))
    return ScaleTable(grids, steps, scales.T.contiguous(), zeros)


def resolve_timesteps(timesteps: Any) -> Tensor:
    """Ascending float32 timesteps from a count, a sequence, a tensor or a scheduler.

    Example:
        >>> resolve_timesteps([900, 100, 500])
        tensor([100., 500., 900.])
        >>> resolve_timesteps(3)
        tensor([0., 1., 2.])
    """
    values = getattr(timesteps, "timesteps", timesteps)
    if getattr(values, "shape", None) == ():  # numbers of numpy, and tensors of one number
        values = values.item()
    if isinstance(values, int) and not isinstance(values, bool):
        values = range(values)
    if hasattr(values, "tolist"):  # tensors, and numpy's arrays
        values = values.flatten().tolist()
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) == 0:
        raise TimestepError(
            f"timesteps = {timesteps!r} is neither a count, a non-empty sequence, a tensor, nor a "
            "scheduler with timesteps."
        )
    return timesteps_tensor([float(value) for value in values])


def load_scales(model: Model, table: ScaleTable | str | Path, lookup: Lookup = "exact") -> Model:
    """Put a saved table into an attached model; in place.

    Args:
        model: An attached model, prepared as the one that the table was made for.
        table: The table, or the file that its `save` wrote.
        lookup: Rule for timesteps between those of the table, see `FrozenBank`.

    Raises:
        TableMismatchError: The table belongs to other layers or other grids.
        TableFormatError: The file is no table.
    """
    if not isinstance(table, ScaleTable):
        table = load_table(table)
    bank = scale_bank(model)
    check_names(expected=bank.names, given=table.names)
    for name, grid in zip(bank.names, bank.grids, strict=True):
        if table.grids[name] != grid:
            raise TableMismatchError(
                f"The table has {table.grids[name]} for {name!r}, the model {grid}. "
                "Prepare the model with the bits that the table was made for."
            )
    ordered = _reorder(table, bank.names)
    model.scale_bank = FrozenBank(ordered, lookup).to(bank.device)
    return model


def _reorder(table: ScaleTable, names: Sequence[str]) -> ScaleTable:
    columns = torch.tensor([table.names.index(name) for name in names])
    return ScaleTable(
        {name: table.grids[name] for name in names},
        table.timesteps,
        table.scales[:, columns],
        table.zero_points[:, columns],
    )
