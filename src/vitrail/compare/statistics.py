"""Means over seeds with their intervals, paired differences, and what may be said of them. All intervals are 95%."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values and the ends of its interval, which a single value does not have."""

    mean: float
    low: float | None
    high: float | None
    count: int

    def map(self, change: Callable[[float], float]) -> "Interval":
        """The interval on another, rising scale."""
        low, high = (None if end is None else change(end) for end in (self.low, self.high))
        return Interval(change(self.mean), low, high, self.count)

    @property
    def sees_difference(self) -> bool:
        """Whether zero lies outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high

    def show(self, form: str) -> str:
        """The mean and its ends, each as the format `form` has it."""
        return f"{show_number(self.mean, form)} ({self.show_ends(form)})"

    def show_ends(self, form: str) -> str:
        """The ends alone, as the format `form` has them."""
        if self.low is None or self.high is None:
            return "one seed, no interval"
        return f"{show_number(self.low, form)} to {show_number(self.high, form)}"


def show_number(value: float, form: str) -> str:
    """A number as the format `form` has it, with a minus that is one."""
    return f"{value:{form}}".replace("-", "−")


def estimate_mean(values: Sequence[float]) -> Interval:
    """The mean of some values, one at least, with Student's t interval."""
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Interval(mean, None, None, count)
    return Interval(mean, *_around(mean, float(np.std(values, ddof=1)) / count**0.5, count - 1), count)


def pair(a: Mapping[int, float], b: Mapping[int, float]) -> Interval | None:
    """The mean of a − b over the seeds that both have, each seed against itself; None if they share none."""
    shared = [a[seed] - b[seed] for seed in a if seed in b]
    return estimate_mean(shared) if shared else None


def say_difference(what: str, difference: Interval) -> str:
    """A sentence on a difference in points: how large, or that none is seen."""
    if difference.low is None or difference.sees_difference:
        return f"{what}: {show_number(difference.mean, '+.1f')} points ({difference.show_ends('+.1f')})"
    return f"{what}: no difference seen ({difference.show_ends('+.1f')})"


def find_crossings(x: Sequence[float], a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Where two curves over the same rising, positive x cross, straight between points on a logarithmic x.

    A curve that only touches the other and turns back does not cross it.
    """
    gaps = [(math.log(place), p - q) for place, p, q in zip(x, a, b, strict=True) if p != q]
    places: list[float] = []
    for (before, gap), (after, next_gap) in itertools.pairwise(gaps):
        if gap * next_gap < 0:
            places.append(math.exp(before + (after - before) * gap / (gap - next_gap)))
    return places


def find_cost(accuracy: float, curve: Sequence[tuple[float, float]]) -> float:
    """The lowest cost at which a curve of (cost, accuracy) reaches `accuracy`, straight on a logarithmic cost.

    A curve that is there at its first point gives that one's cost, which then is an upper bound.

    Raises:
        ValueError: if it never gets there.
    """
    (cost, reached), *later = sorted(curve)
    if reached >= accuracy:
        return cost
    for next_cost, next_reached in later:
        if next_reached >= accuracy:
            share = (accuracy - reached) / (next_reached - reached)
            return cost * (next_cost / cost) ** share
        cost, reached = next_cost, next_reached
    raise ValueError(f"the curve ends at {reached}, below {accuracy}")


@dataclass(frozen=True)
class PowerLaw:
    """y = factor · x^−exponent, with the exponent's interval: above zero where y falls."""

    factor: float
    exponent: Interval

    def at(self, x: float) -> float:
        """The curve's height at `x`."""
        return self.factor * x**-self.exponent.mean


def fit_power_law(x: Sequence[float], y: Sequence[float]) -> PowerLaw | None:
    """The line of least squares through log y over log x; None with fewer than three points or a single x."""
    if len(x) < 3 or len(set(x)) < 2 or min(y) <= 0:
        return None
    fit: Any = stats.linregress(np.log(x), np.log(y))
    falling = -float(fit.slope)
    exponent = Interval(falling, *_around(falling, float(fit.stderr), len(x) - 2), len(x))
    return PowerLaw(math.exp(fit.intercept), exponent)


def _around(mean: float, error: float, freedom: int) -> tuple[float, float]:
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, freedom)) * error
    return mean - half, mean + half
