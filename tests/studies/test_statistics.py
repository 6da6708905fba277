"""Summaries and ratios of draws, by hand and against scipy."""

import pytest
from scipy import stats

from tdq_plugin.studies.statistics import Summary, centre, paired_ratio

DRAWS = (1.0, 2.0, 6.0)


def test_the_interval_is_that_of_students_t() -> None:
    for values in (DRAWS, (3.0, 3.5), tuple(float(n) for n in range(10))):
        expected = stats.t.interval(
            0.95, len(values) - 1, loc=Summary(values).mean, scale=stats.sem(values)
        )
        assert Summary(values).interval == pytest.approx(expected, rel=1e-3)


def test_one_draw_has_no_interval() -> None:
    assert Summary((2.0,)).interval is None


def test_the_centre_of_a_distance_is_the_median() -> None:
    assert centre("frechet_distance_to_float", DRAWS) == 2.0
    assert centre("trajectory_mse", DRAWS) == 3.0


def test_a_ratio_pairs_the_seeds_that_both_have() -> None:
    ratio = paired_ratio("trajectory_mse", {0: 2.0, 1: 8.0, 2: 5.0}, {1: 4.0, 0: 4.0})
    assert ratio is not None
    assert ratio.draws == (0.5, 2.0)
    assert ratio.centre == pytest.approx(10 / 8)
    low, high = ratio.interval or (0, 0)
    assert low * high == pytest.approx(1.0)  # The geometric mean of 1/2 and 2 is 1.


@pytest.mark.parametrize("second", [{3: 1.0}, {0: 0.0}])
def test_what_cannot_be_divided(second: dict[int, float]) -> None:
    assert paired_ratio("pixel_mse", {0: 1.0}, second) is None
