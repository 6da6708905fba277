"""Latency as paired ratios: what a loaded machine cannot blur."""

import random
import time
from collections.abc import Callable, Mapping
from statistics import quantiles
from typing import Any, TypedDict

import torch

from tdq_plugin.errors import ConfigError

__all__ = ["Ratio", "paired_ratios"]


class Ratio(TypedDict):
    """Median and quartiles of a time divided by the reference's time in the same round."""

    median: float
    q25: float
    q75: float


def paired_ratios(
    calls: Mapping[str, Callable[[], Any]],
    reference: str,
    rounds: int,
    seed: int = 0,
    advance: Callable[[], Any] | None = None,
) -> dict[str, Ratio]:
    """Time every call once a round, in random order, and divide by the reference of the round.

    While torch runs on one thread, the clock is the CPU time of that thread, and other processes
    do not count. With more threads it is wall time.

    Args:
        calls: What to time, by name. Each is called twice beforehand.
        reference: The name whose time is 1.
        rounds: At least 2.
        seed: Of the random order.
        advance: Called after each round, for a progress bar.

    Returns:
        The ratios by name.

    Raises:
        ConfigError: The reference is not among the calls, or there are too few rounds.

    Example:
        >>> ratios = paired_ratios({"a": lambda: sum(range(9)), "b": dict}, "a", rounds=4)
        >>> ratios["a"]["median"]
        1.0
    """
    _check(calls, reference, rounds)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    names, shuffle = list(calls), random.Random(seed).shuffle
    for call in [*calls.values()] * 2:
        call()
    ratios: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        shuffle(names)
        times = {name: _seconds(calls[name], clock) for name in names}
        for name, seconds in times.items():
            ratios[name].append(seconds / times[reference])
        if advance is not None:
            advance()
    return {name: _quartiles(ratios[name]) for name in calls}


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    call()
    return clock() - start


def _quartiles(values: list[float]) -> Ratio:
    q25, median, q75 = quantiles(values, n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75}


def _check(calls: Mapping[str, Callable[[], Any]], reference: str, rounds: int) -> None:
    if reference not in calls:
        raise ConfigError(f"The reference {reference!r} is not one of the calls {list(calls)}.")
    if rounds < 2:
        raise ConfigError(f"{rounds} rounds give no quartiles. Take at least 2.")
