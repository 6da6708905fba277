"""The framework-free half of freezing: which timesteps, and which layers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from torch import nn

import tdq_plugin as tdq
from tdq_plugin.errors import AdapterError, TableMismatchError, TimestepError
from tdq_plugin.freeze import evaluate_table, resolve_timesteps
from tdq_plugin.grid import activation_grid
from tdq_plugin.table import check_names

GRIDS = {"first": activation_grid(4), "second": activation_grid(8)}


class Attached(nn.Module):
    """The least that is an attached model."""

    def __init__(self) -> None:
        super().__init__()
        self.scale_bank = tdq.GeneratorBank(GRIDS)
        self.scale_bank.set_static(torch.tensor([0.1, 0.2]), torch.tensor([7.0, 128.0]))
        nn.init.normal_(self.scale_bank.weights[-1], generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("timesteps", "expected"),
    [
        (3, [0.0, 1.0, 2.0]),
        ([900, 1, 900, 500.5], [1.0, 500.5, 900.0]),
        (range(0, 1000, 400), [0.0, 400.0, 800.0]),
        (torch.tensor([[3], [1]]), [1.0, 3.0]),
        (torch.tensor(3), [0.0, 1.0, 2.0]),
        (np.int64(3), [0.0, 1.0, 2.0]),
        (torch.tensor([7]), [7.0]),
        (np.array([7, 5]), [5.0, 7.0]),
        ((5,), [5.0]),
        ([1.0, 1.0 + 1e-12], [1.0]),
    ],
)
def test_timesteps_are_sorted_and_unique(timesteps, expected: list[float]) -> None:
    resolved = resolve_timesteps(timesteps)
    assert resolved.tolist() == expected
    assert resolved.dtype == torch.float32


def test_timesteps_of_a_scheduler() -> None:
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(20)
    assert resolve_timesteps(scheduler).tolist() == sorted(scheduler.timesteps.tolist())


WRONG = [0, -3, [], True, "999", None, 2.5, torch.ones(0), torch.tensor(2.5), np.bool_(True)]


@pytest.mark.parametrize("timesteps", WRONG, ids=repr)
def test_what_are_no_timesteps(timesteps) -> None:
    with pytest.raises(TimestepError, match=r"is neither a count, a non-empty sequence, a tensor"):
        resolve_timesteps(timesteps)


def test_freezing_replaces_the_bank_only() -> None:
    model = Attached()
    dense = model.scale_bank(torch.tensor([10.0, 20.0]))
    assert tdq.freeze(model, [20, 10], lookup="nearest") is model
    assert isinstance(model.scale_bank, tdq.FrozenBank)
    for frozen, live in zip(model.scale_bank(torch.tensor([10, 20])), dense, strict=True):
        assert torch.equal(frozen, live)
    assert model.scale_bank.lookup == "nearest"
    with pytest.raises(
        AdapterError, match=r"is a FrozenBank: it is frozen already. .*set_scale_bank"
    ):
        tdq.freeze(model, 3)


def test_a_constant_zero_point_is_stored_once() -> None:
    bank = Attached().scale_bank
    assert evaluate_table(bank, 50).zero_points.tolist() == [[7.0, 128.0]]
    moving = tdq.LearnedTableBank(GRIDS, num_timesteps=50, timestep_zero_point=True)
    moving.set_static(torch.tensor([0.1, 0.2]), torch.tensor([7.0, 128.0]))
    with torch.no_grad():
        moving.table[0, 3, 1] = 2.0
    assert evaluate_table(moving, 50).zero_points.shape == (50, 2)
    assert evaluate_table(moving, 50).zero_points[3].tolist() == [9.0, 128.0]


def test_a_table_in_another_order_is_put_in_the_models_order() -> None:
    table = evaluate_table(Attached().scale_bank, 4)
    swapped = tdq.ScaleTable(
        {name: table.grids[name] for name in ("second", "first")},
        table.timesteps,
        table.scales.flip(1),
        table.zero_points.flip(1),
    )
    model = tdq.load_scales(Attached(), swapped)
    assert model.scale_bank.names == ("first", "second")
    assert torch.equal(model.scale_bank.scales, table.scales)


def test_a_table_of_other_grids() -> None:
    table = evaluate_table(Attached().scale_bank, 4)
    other = tdq.ScaleTable(
        table.grids | {"first": activation_grid(8)},
        table.timesteps,
        table.scales,
        table.zero_points,
    )
    with pytest.raises(TableMismatchError, match=r"quant_max=255.* for 'first', the model .*=15"):
        tdq.load_scales(Attached(), other)


def test_names_of_other_layers() -> None:
    message = r"1 of the model's 2 quantizers are missing \(first: \['second'\]\), 1 are unknown"
    with pytest.raises(TableMismatchError, match=message):
        check_names(expected=["first", "second"], given=["third", "first"])
    check_names(expected=["first", "second"], given=["second", "first"])


def test_a_model_that_is_not_attached() -> None:
    with pytest.raises(AdapterError, match=r"This Linear has no scale bank. Call tdq_plugin.att"):
        tdq.freeze(nn.Linear(1, 1), 3)
