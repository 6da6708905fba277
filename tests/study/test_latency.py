"""Paired ratios find a known ratio."""

import pytest
import torch

from tdq_plugin.errors import ConfigError
from tdq_plugin.study.latency import paired_ratios


def work(amount):
    matrix = torch.ones(64, 64)

    def call():
        for _ in range(amount):
            matrix @ matrix

    return call


def test_three_times_the_work_takes_three_times_the_time():
    ratios = paired_ratios({"one": work(1000), "three": work(3000)}, "one", rounds=21)
    assert ratios["one"] == {"median": 1.0, "q25": 1.0, "q75": 1.0}
    assert 2.5 < ratios["three"]["median"] < 3.5
    assert ratios["three"]["q25"] <= ratios["three"]["median"] <= ratios["three"]["q75"]


def test_unknown_reference_and_too_few_rounds():
    with pytest.raises(ConfigError, match=r"'none' is not one of the calls \['one'\]"):
        paired_ratios({"one": work(1)}, "none", rounds=3)
    with pytest.raises(ConfigError, match="1 rounds give no quartiles"):
        paired_ratios({"one": work(1)}, "one", rounds=1)
