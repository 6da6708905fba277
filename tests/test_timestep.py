"""Every form of a timestep becomes one form, and anything else is refused with its value shown."""

import inspect

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tdq_plugin.errors import TimestepError
from tdq_plugin.timestep import as_timesteps, bind_timestep, find_timestep_argument


@pytest.mark.parametrize(
    "timestep",
    [
        7,
        7.0,
        np.float64(7),
        torch.tensor(7),
        torch.tensor([7]),
        torch.tensor(7.0),
        torch.tensor([7], dtype=torch.int32),
        torch.tensor([7.0], dtype=torch.float64),
        torch.tensor([7.0], dtype=torch.bfloat16),
    ],
    ids=repr,
)
def test_one_timestep_in_any_form(timestep) -> None:
    assert torch.equal(as_timesteps(timestep), torch.tensor([7.0]))
    assert as_timesteps(timestep).dtype == torch.float32


@given(st.lists(st.integers(0, 2**24), min_size=1, max_size=8))
def test_integers_of_a_batch_are_kept_exactly(values: list[int]) -> None:
    assert as_timesteps(torch.tensor(values)).tolist() == values


def test_gradient_reaches_a_timestep_that_wants_one() -> None:
    timestep = torch.tensor([3.0], requires_grad=True)
    as_timesteps(timestep).square().sum().backward()
    assert timestep.grad.item() == 6.0


@pytest.mark.parametrize(
    ("timestep", "message"),
    [
        (None, "timestep is None. Pass the timestep"),
        (True, "not True of type bool"),
        ("7", "not '7' of type str"),
        ([7], r"not \[7\] of type list"),
        (1j, "not 1j of type complex"),
        (float("nan"), "timestep nan is not finite"),
        (float("inf"), "timestep inf is not finite"),
        (torch.tensor([1.0, float("nan")]), r"timestep \[1.0, nan\] is not finite"),
        (torch.tensor([]), "empty. Give one timestep per sample"),
        (torch.zeros(2, 1), r"not \(2, 1\). Give one timestep per sample"),
        (torch.tensor(True), "integer or float, not torch.bool"),
        (torch.tensor([1j]), "integer or float, not torch.complex64"),
    ],
)
def test_what_is_no_timestep(timestep, message: str) -> None:
    with pytest.raises(TimestepError, match=message):
        as_timesteps(timestep)


@pytest.mark.parametrize("name", ["timestep", "timesteps", "t"])
def test_the_usual_names_are_found(name: str) -> None:
    forward = eval(f"lambda sample, {name}, context=None: None")
    assert find_timestep_argument(forward) == name


def test_a_name_that_the_user_gives_wins() -> None:
    def forward(x, sigma, t): ...

    assert find_timestep_argument(forward, "sigma") == "sigma"
    assert find_timestep_argument(inspect.signature(forward)) == "t"


def test_a_method_has_no_self() -> None:
    class Model(nn.Module):
        def forward(self, x, timestep): ...

    assert find_timestep_argument(Model().forward) == "timestep"


def test_no_timestep_argument_lists_the_arguments() -> None:
    def forward(x, sigma): ...

    with pytest.raises(TimestepError, match=r"'timestep' or .* it has \['x', 'sigma'\]. Name"):
        find_timestep_argument(forward)
    with pytest.raises(TimestepError, match="no argument 'time'"):
        find_timestep_argument(forward, "time")


def test_value_of_a_call() -> None:
    def forward(x, timestep, label=None): ...

    signature = inspect.signature(forward)
    assert bind_timestep(signature, "timestep", ("x", 5), {}) == 5
    assert bind_timestep(signature, "timestep", ("x",), {"timestep": 5}) == 5
    assert bind_timestep(signature, "timestep", ("x", 0), {}) == 0
    with pytest.raises(TimestepError, match="without its timestep argument 'timestep'"):
        bind_timestep(signature, "timestep", ("x",), {})
