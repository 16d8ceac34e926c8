"""Means and their intervals: known ones, width where it is due, and what several trainings add."""

import numpy as np
import pytest

from lab import scores


def test_intervals_hold_the_mean_and_shrink_with_the_number_of_sets():
    rng = np.random.default_rng(0)
    few, many = rng.random(20) < 0.7, rng.random(2000) < 0.7
    for values in (few, many):
        mean, low, high = scores.interval(values)
        assert low <= mean <= high and mean == values.mean()
    widths = [np.subtract(*scores.interval(values)[:0:-1]) for values in (few, many)]
    assert widths[1] < widths[0] / 4


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_rates_have_wilsons_interval(right, count, low, high):
    """As Newcombe (1998, doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E) prints it."""
    found = scores.interval([1] * right + [0] * (count - right))
    assert found == pytest.approx((right / count, low, high), abs=5e-5)


def test_no_interval_of_shares_or_of_their_differences_is_without_width():
    for values in ([1] * 100, [0] * 100, [0.75] * 100, [[1] * 100] * 3, [1]):
        mean, low, high = scores.interval(values)
        assert low <= mean <= high and high - low > 0.03
        mean, low, high = scores.difference(values, values)
        assert mean == 0 and low < -0.02 and high > 0.02
    share, low, high = scores.above_chance([1] * 100, np.zeros(100), np.ones(100))
    assert share == high == 1 and low == pytest.approx(scores.interval([1] * 100)[1])
    assert scores.interval([0.7, 0.8] * 50)[2] < 0.77, "shares of several panels spread less than a rate"
    assert scores.interval([28.0, 28.0]) == (28, 28, 28), "a figure that is no share"


def test_paired_rates_have_bonett_and_prices_interval():
    """Of 21 sets 1 is right in the first only and 7 in the second only; the formula has 2 and 8 of 23."""
    values, others = [1] + [0] * 7 + [1] + [0] * 12, [0] + [1] * 7 + [1] + [0] * 12
    centre, width = -6 / 23, 1.959964 * np.sqrt((10 - 36 / 23) / 23**2)
    assert scores.difference(values, others) == pytest.approx((-6 / 21, centre - width, centre + width))


def test_sets_that_tell_nothing_are_left_out():
    nan = np.nan
    assert scores.interval([1, nan, 0, 1]) == scores.interval([1, 0, 1])
    assert scores.difference([1, nan, 0.5, 1], [0, 0, nan, 0]) == scores.difference([1, 1], [0, 0])
    assert np.isnan(scores.interval([nan, nan])).all() and "| a | b |  |  |" in scores.line("a", "b", [(nan,) * 3])
    assert scores.above_chance([1, nan, 0.5], [0, 0, nan], [1, 1, 1])[0] == 0.75
    assert scores.above_chance([1] * 50, [1] * 49 + [0], [1] * 50) is None, "there is hardly any room"


def test_several_trainings_widen_the_interval_as_far_as_they_differ():
    rng = np.random.default_rng(0)
    sets = rng.random(400)
    same, apart = np.stack([sets, sets, sets]), np.stack([sets - 0.3, sets, sets + 0.3])
    one, alike, other = scores.interval(sets), scores.interval(same), scores.interval(apart)
    assert alike == pytest.approx(one, abs=5e-3) and other[0] == pytest.approx(one[0])
    assert other[1] < one[0] - 0.25 and other[2] > one[0] + 0.25, "no further than the single trainings, and as far"
    rates = rng.random((3, 100)) < 0.5
    mean, low, high = scores.interval(rates)
    assert high - low >= np.subtract(*scores.interval([1, 0] * 50)[:0:-1]) * 0.99, "no narrower than one training's"
    mean, low, high = scores.difference(apart, apart - 0.1)
    assert mean == pytest.approx(0.1) and 0.01 < high - low < 0.02, "paired by training"
    assert scores.difference(apart, sets)[1] < -0.25, "one training of the other is compared with all"


def test_the_spread_of_means_over_trainings_is_not_too_small():
    """Of three trainings that differ with a deviation of 1, means have one of 1 / sqrt(3)."""
    rng = np.random.default_rng(0)
    trainings = rng.normal(size=(200, 3))
    variances = [scores._means(np.repeat(each[:, None], 2, axis=1))[0, 1:].var() for each in trainings]
    assert np.mean(variances) == pytest.approx(1 / 3, rel=0.15)


def test_shares_above_chance_leave_out_what_chance_gives():
    rng = np.random.default_rng(0)
    none, most = (rng.random((2, 300)) < [[0.3], [0.9]]).astype(float)
    own = np.where(rng.random(300) < 0.5, most, none)
    share, low, high = scores.above_chance(own, none, most)
    wanted = (own.mean() - none.mean()) / (most.mean() - none.mean())
    assert share == pytest.approx(wanted) and low < share < high and high - low < 0.3
    assert scores.above_chance(none, none, most)[0] == 0 and scores.above_chance(most, none, most)[0] == 1
    assert scores.above_chance(own, most, none) is None and scores.above_chance(own, none, none) is None
    assert scores.above_chance(np.stack([own, most]), none, most)[0] == pytest.approx((share + 1) / 2)
