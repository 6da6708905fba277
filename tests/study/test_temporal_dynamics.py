"""The movement of activations over t, against numpy."""

import json

import numpy as np
import pytest
import torch

from tdq_plugin.errors import CalibrationError
from tdq_plugin.study import temporal_dynamics

TIMESTEPS = torch.linspace(0, 950, 20)


def test_equals_numpy() -> None:
    std = torch.rand(50, 20, generator=torch.Generator().manual_seed(0)) + 0.5
    std += torch.linspace(0, 1, 50)[:, None] * TIMESTEPS / 950
    ranges = 3 * std.flip(0)
    dynamics = temporal_dynamics(TIMESTEPS, std, ranges)
    values = std.double().numpy()
    ratio = values.max(1) / values.min(1)
    r = np.abs([np.corrcoef(TIMESTEPS.numpy(), row)[0, 1] for row in values])
    assert dynamics.std_ratio.per_layer == pytest.approx(ratio)
    assert dynamics.std_ratio.median == pytest.approx(np.median(ratio))
    assert dynamics.std_ratio.p90 == pytest.approx(np.quantile(ratio, 0.9))
    assert dynamics.range_ratio.maximum == pytest.approx(ratio.max())
    assert dynamics.share_correlated_0_5 == pytest.approx((r > 0.5).mean())
    assert dynamics.share_correlated_0_7 == pytest.approx((r > 0.7).mean())
    assert 0 < dynamics.share_correlated_0_7 < dynamics.share_correlated_0_5 < 1


def test_a_layer_that_stands_still_is_not_correlated() -> None:
    still = torch.full((1, 20), 0.3)
    dynamics = temporal_dynamics(TIMESTEPS, still, still)
    assert dynamics.std_ratio.maximum == 1
    assert dynamics.share_correlated_0_5 == 0


def test_can_be_written_as_json() -> None:
    dynamics = temporal_dynamics(TIMESTEPS, torch.ones(2, 20), torch.ones(2, 20)).as_dict()
    assert json.loads(json.dumps(dynamics))["std_ratio"]["per_layer"] == [1.0, 1.0]


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_statistics_that_give_no_ratio(value: float) -> None:
    ranges = torch.ones(3, 20)
    ranges[1, 2] = value
    with pytest.raises(CalibrationError, match=f"ranges of layer 1 at t = 100 is {value:g}"):
        temporal_dynamics(TIMESTEPS, torch.ones(3, 20), ranges)


def test_shapes_that_do_not_fit() -> None:
    with pytest.raises(CalibrationError, match=r"std has shape \(20, 3\); \(layers, 20\)"):
        temporal_dynamics(TIMESTEPS, torch.ones(20, 3), torch.ones(3, 20))


def test_a_single_timestep() -> None:
    with pytest.raises(CalibrationError, match="two different timesteps"):
        temporal_dynamics(torch.zeros(2), torch.ones(3, 2), torch.ones(3, 2))
