"""The frozen bank: its rows are the generator's, and every lookup rule does what it says."""

import copy

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tdq_plugin.errors import ConfigError, LookupRuleError
from tdq_plugin.freeze import evaluate_table
from tdq_plugin.grid import activation_grid
from tdq_plugin.scales import PAPER, FrozenBank, GeneratorBank, GeneratorConfig, Lookup
from tdq_plugin.table import ScaleTable

GRIDS = {"conv": activation_grid(8), "linear": activation_grid(4)}


def table(timesteps: list[float], moving_zero_point: bool = False) -> ScaleTable:
    steps = torch.tensor(timesteps)
    scales = torch.stack([0.5 + steps / 100, 2 + steps.sin()], dim=1)
    zero_points = torch.stack([(steps % 7).floor(), torch.full_like(steps, 3)], dim=1)
    return ScaleTable(GRIDS, steps, scales, zero_points if moving_zero_point else zero_points[:1])


def trained_generator(config: GeneratorConfig, **options) -> GeneratorBank:
    bank = GeneratorBank(GRIDS, config, **options)
    bank.set_static(torch.tensor([0.05, 1.5]), torch.tensor([128.0, 3.0]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return bank


def rows_of(bank: FrozenBank, timesteps: Tensor) -> Tensor:
    return torch.stack(bank(timesteps))


@pytest.mark.parametrize("config", [GeneratorConfig(), PAPER], ids=["default", "paper"])
@pytest.mark.parametrize("moving", [False, True])
def test_frozen_rows_are_the_generators(config: GeneratorConfig, moving: bool) -> None:
    bank = trained_generator(config, timestep_zero_point=moving)
    timesteps = torch.arange(1000.0)
    frozen = FrozenBank(evaluate_table(bank, 1000))
    dense = torch.stack(bank(timesteps)).detach()
    assert torch.equal(rows_of(frozen, timesteps), dense)
    assert dense[0].std(dim=1).min() > 0
    for t in (0, 1, 333, 998, 999):
        single = torch.stack(bank(t)).detach()
        torch.testing.assert_close(rows_of(frozen, torch.tensor(t)), single, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lookup", ["exact", "nearest", "linear"])
@pytest.mark.parametrize("moving", [False, True])
def test_a_timestep_of_the_table_gives_its_row_under_every_rule(
    lookup: Lookup, moving: bool
) -> None:
    rows = table([0.0, 10.0, 11.5, 900.0], moving)
    bank = FrozenBank(rows, lookup)
    order = [2, 0, 3, 3, 1]
    scales, zero_points = bank(rows.timesteps[order])
    assert torch.equal(scales, rows.scales[order].T)
    assert torch.equal(zero_points, rows.zero_points.expand(4, 2)[order].T)


@pytest.mark.parametrize(
    ("timestep", "row"), [(0.0, 0), (4.9, 0), (5.0, 0), (5.1, 1), (10.0, 1), (455.0, 1), (899, 2)]
)
def test_nearest_row(timestep: float, row: int) -> None:
    rows = table([0.0, 10.0, 900.0])
    assert torch.equal(FrozenBank(rows, "nearest")(timestep)[0][:, 0], rows.scales[row])


@given(st.floats(0, 900, width=32))
def test_linear_lies_on_the_line_between_two_rows(timestep: float) -> None:
    rows = table([0.0, 10.0, 900.0], moving_zero_point=True)
    scales, zero_points = FrozenBank(rows, "linear")(timestep)
    below = 0 if timestep < 10 else 1
    low, high = rows.timesteps[below], rows.timesteps[below + 1]
    weight = (timestep - low) / (high - low)
    expected = rows.scales[below] * (1 - weight) + rows.scales[below + 1] * weight
    torch.testing.assert_close(scales[:, 0], expected, rtol=1e-5, atol=0)
    nearest = (rows.timesteps - timestep).abs().argmin()
    assert torch.equal(zero_points[:, 0], rows.zero_points[nearest])


@pytest.mark.parametrize("lookup", ["exact", "nearest", "linear"])
def test_a_table_of_one_timestep(lookup: Lookup) -> None:
    rows = table([42.0])
    assert torch.equal(FrozenBank(rows, lookup)(42)[0][:, 0], rows.scales[0])
    with pytest.raises(LookupRuleError, match=r"Timestep 43 is not in the frozen table of 1"):
        FrozenBank(rows, lookup)(43)


@pytest.mark.parametrize("lookup", ["exact", "nearest", "linear"])
def test_neighbouring_floats_are_two_timesteps(lookup: Lookup) -> None:
    first = torch.tensor([0.1, 0.3, 500.0])
    steps = torch.stack([first, first.nextafter(first + 1)], dim=1).flatten()
    bank = FrozenBank(table(steps.tolist()), lookup)
    assert bank.index(steps).tolist() == list(range(6))


def test_exact_refuses_what_lies_between() -> None:
    message = (
        r"Timestep 5, 10.5 is not in the frozen table of 3 timesteps \(0 .. 900, lookup='exact'\)"
        r". Freeze with the timesteps that the sampler visits"
    )
    with pytest.raises(LookupRuleError, match=message):
        FrozenBank(table([0.0, 10.0, 900.0]))(torch.tensor([5.0, 10.0, 10.5]))


@pytest.mark.parametrize("lookup", ["exact", "nearest", "linear"])
@pytest.mark.parametrize("timestep", [-1, 900.5, 1e9])
def test_every_rule_refuses_what_lies_outside(lookup: Lookup, timestep: float) -> None:
    with pytest.raises(LookupRuleError) as raised:
        FrozenBank(table([0.0, 10.0, 900.0]), lookup)(timestep)
    message = str(raised.value)
    assert message.startswith(f"Timestep {timestep:g} is not in the frozen table of 3 timesteps")
    # Advice that has been followed already helps nobody.
    assert ("choose lookup='nearest' or 'linear'" in message) == (lookup == "exact")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float64])
def test_dtype_of_the_timestep_does_not_matter(dtype: torch.dtype) -> None:
    bank = FrozenBank(table([0.0, 10.0, 900.0]))
    assert torch.equal(bank(torch.tensor([900, 10], dtype=dtype))[0], bank.scales[[2, 1]].T)


def test_table_of_a_bank_round_trips() -> None:
    rows = table([0.0, 10.0, 900.0], moving_zero_point=True)
    returned = FrozenBank(rows).table
    assert returned.grids == rows.grids
    for name in ("timesteps", "scales", "zero_points"):
        assert torch.equal(getattr(returned, name), getattr(rows, name))


def test_has_no_parameters_and_stays_float32() -> None:
    bank = FrozenBank(table([0.0, 10.0]))
    assert list(bank.parameters()) == []
    half = copy.deepcopy(bank).half()
    assert half.scales.dtype == half.timesteps.dtype == torch.float32
    assert torch.equal(half(10)[0], bank(10)[0])
    assert not bank(10)[0].requires_grad


def test_state_dict_moves_rows_to_another_bank() -> None:
    first, second = FrozenBank(table([0.0, 10.0])), FrozenBank(table([5.0, 20.0]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(rows_of(second, torch.tensor(10)), rows_of(first, torch.tensor(10)))


def test_a_lookup_rule_that_there_is_not() -> None:
    with pytest.raises(ConfigError, match="lookup = 'Linear' is not one of exact, nearest, linear"):
        FrozenBank(table([0.0, 10.0]), "Linear")


class Model(nn.Module):
    """A model that looks its scales up for itself."""

    def __init__(self, lookup: Lookup) -> None:
        super().__init__()
        self.scale_bank = FrozenBank(table([0.0, 10.0, 900.0], moving_zero_point=True), lookup)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        scales, zero_points = self.scale_bank(timestep)
        return x * scales[0] + zero_points[1]


@pytest.mark.parametrize("lookup", ["exact", "nearest", "linear"])
def test_compiles_without_graph_break_or_recompilation(lookup: Lookup) -> None:
    model = Model(lookup)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for timestep in (0.0, 10.0, 900.0):
        arguments = torch.ones(2), torch.tensor([timestep, 10.0])
        assert torch.equal(compiled(*arguments), model(*arguments))
    assert counter.frame_count == 1


def test_compiled_lookup_still_refuses_what_lies_outside() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(Model("nearest"), fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="not in the frozen scale table"):
        compiled(torch.ones(2), torch.tensor([950.0, 10.0]))
