"""What replies come to, with 95 % intervals by the bootstrap: the rows are drawn again and again, with replacement,
seeded. Knows numbers, not what they count. A share that no row has, or all, has an interval of no width: nothing else
can be drawn."""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy

SEED = 42
DRAWS = 1000
# With fewer rows in which two models are unlike, chance alone lets all point one way more often than once in 20
# (sign test: 2 / 2**5 = 6 %), although the interval of such a draw may well leave 0.
LEAST_UNLIKE = 6


class Measure(NamedTuple):
    """One row of statistics for each reply; what all come to follows from their sum alone, so a draw costs little."""

    key: str  # for programs
    name: str  # for people
    unit: str  # "%": a share from 0 to 1, shown in percent
    statistics: numpy.ndarray  # [replies, k]; all 0 in a row that does not count
    total: Callable[[list[float]], float]  # of their sum; nan where there is none
    floor: numpy.ndarray | None = None  # the same of each answer against another question's reference


class Line(NamedTuple):
    """A measure of one model. None where there is no figure."""

    key: str
    name: str
    n: int  # replies that count
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    unit: str


class Difference(NamedTuple):
    """A measure of two models that got the same questions."""

    key: str
    name: str
    n: int  # questions
    value: float | None
    other: float | None
    difference: float | None  # value - other
    low: float | None
    high: float | None
    differs: bool  # only where the interval leaves 0
    unit: str


def ratio(sums: list[float]) -> float:
    """The total of a mean: the statistics are what is counted, and 1; or of a speed: tokens, and seconds."""
    return sums[0] / sums[1] if sums[1] else math.nan


@lru_cache(maxsize=8)
def draws(rows: int) -> numpy.ndarray:
    """[DRAWS, rows]: how often each row is in each draw. The same for all models, which makes their differences
    paired."""
    return numpy.random.default_rng(SEED).multinomial(rows, numpy.full(rows, 1 / rows), DRAWS)


def drawn(measure: Measure) -> numpy.ndarray:
    """[DRAWS]: what each draw comes to."""
    sums = draws(len(measure.statistics)) @ measure.statistics
    return numpy.array([measure.total(each) for each in sums.tolist()])


def bounds(figures: numpy.ndarray) -> tuple[float | None, float | None]:
    """The middle 95 %."""
    figures = figures[~numpy.isnan(figures)]
    return tuple(numpy.percentile(figures, [2.5, 97.5]).tolist()) if len(figures) else (None, None)


def figure(total, statistics: numpy.ndarray | None) -> float | None:
    """What all rows come to, or None."""
    value = math.nan if statistics is None else total(statistics.sum(axis=0).tolist())
    return None if math.isnan(value) else float(value)


def line(measure: Measure) -> Line:
    """A measure of one model."""
    key, name, unit, statistics, total, floor = measure
    n, value = int(statistics.any(axis=1).sum()), figure(total, statistics)
    return Line(key, name, n, value, *bounds(drawn(measure)), figure(total, floor), unit)


def compare(one: Measure, other: Measure) -> Difference:
    """One model's measure held against another's on the same questions, by the paired bootstrap."""
    assert (one.key, len(one.statistics)) == (other.key, len(other.statistics)), (one.key, other.key)
    value, against = (figure(measure.total, measure.statistics) for measure in (one, other))
    known = value is not None and against is not None
    low, high = bounds(drawn(one) - drawn(other)) if known else (None, None)
    unlike = int((one.statistics != other.statistics).any(axis=1).sum())
    differs = known and low is not None and not low <= 0 <= high and unlike >= LEAST_UNLIKE
    difference = value - against if known else None
    return Difference(one.key, one.name, len(one.statistics), value, against, difference, low, high, differs, one.unit)
