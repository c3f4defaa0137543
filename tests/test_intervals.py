"""The bootstrap: seeded, paired, and no difference where there is none."""

import numpy
import pytest

from parts import intervals
from parts.intervals import Measure, ratio


def share(values, of=None) -> Measure:
    values = numpy.array(values, dtype=float)
    of = numpy.ones(len(values)) if of is None else numpy.array(of, dtype=float)
    return Measure("share", "份额", "%", numpy.stack([values, of], axis=1), ratio)


def test_an_interval_is_about_as_wide_as_the_formula_says():
    line = intervals.line(share([1] * 80 + [0] * 160))
    width = 1.96 * (1 / 3 * 2 / 3 / 240) ** 0.5  # of a share, by the normal distribution
    assert line.value == pytest.approx(1 / 3) and line.n == 240
    assert line.low == pytest.approx(1 / 3 - width, abs=0.008) and line.high == pytest.approx(1 / 3 + width, abs=0.008)
    assert intervals.line(share([1] * 80 + [0] * 160)) == line  # seeded


def test_rows_that_do_not_count_are_not_counted():
    line = intervals.line(share([5, 0, 7], of=[1, 0, 1]))
    assert (line.n, line.value) == (2, 6)
    nothing = intervals.line(share([0, 0], of=[0, 0]))
    assert nothing[2:7] == (0, None, None, None, None)
    assert intervals.compare(share([0, 0], of=[0, 0]), share([1, 1])).differs is False


def test_what_is_compared_with_itself_differs_nowhere():
    values = numpy.random.default_rng(1).random(50)
    found = intervals.compare(share(values), share(values))
    assert (found.difference, found.low, found.high, found.differs) == (0, 0, 0, False)


def test_pairs_show_a_difference_that_two_intervals_would_hide():
    """Each row is a little better: the rows scatter far more than they differ."""
    generator = numpy.random.default_rng(2)
    values = generator.random(100)
    better = share(values + 0.02 + generator.normal(0, 0.01, 100))
    lines = [intervals.line(each) for each in (better, share(values))]
    assert lines[0].low < lines[1].high
    found = intervals.compare(better, share(values))
    assert found.differs and 0 < found.low < found.difference < found.high
    assert found.difference == pytest.approx(0.02, abs=0.005)
    assert found.high < 0.03 and not intervals.compare(share(values[:5] + 1), share(values[:5])).differs


def test_chance_is_called_a_difference_about_once_in_twenty():
    """Of 200 pairs of models that are the same."""
    generator = numpy.random.default_rng(3)
    pairs = [(share(generator.random(60) < 0.4), share(generator.random(60) < 0.4)) for _ in range(200)]
    assert sum(intervals.compare(*pair).differs for pair in pairs) <= 20


def test_a_few_rows_that_are_unlike_are_no_difference():
    same = [0] * 200
    assert not intervals.compare(share([1] * 5 + same), share([0] * 5 + same)).differs
    assert intervals.compare(share([1] * 9 + same), share([0] * 9 + same)).differs
