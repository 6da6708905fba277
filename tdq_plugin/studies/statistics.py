"""Several draws of one number, and ratios of draws that belong together."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import mean, median, stdev

__all__ = ["Ratio", "Summary", "centre", "paired_ratio"]

# Student's t, two-sided 95 %, by degrees of freedom; the last one serves all higher ones.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Summary:
    """Draws of one number.

    Example:
        >>> draws = Summary((1.0, 2.0, 6.0))
        >>> draws.mean, draws.median, draws.low, draws.high
        (3.0, 2.0, 1.0, 6.0)
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return mean(self.values)

    @property
    def median(self) -> float:
        """The middle draw."""
        return median(self.values)

    @property
    def low(self) -> float:
        """Smallest draw."""
        return min(self.values)

    @property
    def high(self) -> float:
        """Largest draw."""
        return max(self.values)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % confidence interval of the mean by Student's t; None for a single draw."""
        count = len(self.values)
        if count < 2:
            return None
        quantile = _T95[min(count - 1, len(_T95)) - 1]
        half = quantile * stdev(self.values) / math.sqrt(count)
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class Ratio:
    """One method divided by another.

    Attributes:
        centre: Ratio of the two methods' centres.
        draws: Ratio in each seed that both have.
        interval: 95 % confidence interval of the geometric mean of `draws`; None for one seed.
    """

    centre: float
    draws: tuple[float, ...]
    interval: tuple[float, float] | None


def centre(metric: str, values: tuple[float, ...]) -> float:
    """The median of a Fréchet distance, which jumps from draw to draw; the mean of the others."""
    return median(values) if "frechet" in metric else mean(values)


def paired_ratio(
    metric: str, first: Mapping[int, float], second: Mapping[int, float]
) -> Ratio | None:
    """Divide two methods seed by seed; None if they share no seed or a value is not positive.

    Args:
        metric: Decides on the centre.
        first: Values by seed.
        second: The same of the method that is divided by.

    Example:
        >>> paired_ratio("pixel_mse", {0: 1.0, 1: 3.0}, {0: 2.0, 1: 2.0, 2: 9.0}).draws
        (0.5, 1.5)
    """
    seeds = sorted(first.keys() & second.keys())
    above, below = (tuple(values[seed] for seed in seeds) for values in (first, second))
    if not seeds or min(above + below) <= 0:
        return None
    draws = tuple(x / y for x, y in zip(above, below, strict=True))
    spread = Summary(tuple(math.log(draw) for draw in draws)).interval
    interval = (math.exp(spread[0]), math.exp(spread[1])) if spread else None
    return Ratio(centre(metric, above) / centre(metric, below), draws, interval)
