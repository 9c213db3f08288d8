"""Intervals of means: Student's t, from the integral that defines it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import mean, stdev

_PANELS = 2000  # of Simpson's rule on [0, pi / 2]; even


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided confidence interval.

    Args:
        mean: of the values.
        low, high: the bounds of the interval.
        count: how many values there were.
    """

    mean: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The mean of independent values and the confidence interval of Student's t.

    Raises:
        ValueError: fewer than two values, which have no spread.
    """
    if len(values) < 2:
        raise ValueError(f"an interval needs at least 2 values, got {len(values)}")
    middle = mean(values)
    half = quantile(0.5 + confidence / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - half, middle + half, len(values))


@lru_cache(maxsize=64)
def quantile(probability: float, freedom: int) -> float:
    """The t with P(X <= t) = `probability`, from 0.5 up to 1, for Student's X with `freedom` degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _below(middle, freedom) < probability else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _below(angle: float, freedom: int) -> float:
    """P(X <= sqrt(freedom) tan(angle)): with t = sqrt(freedom) tan(x), the density is a power of a cosine."""
    factor = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    step = angle / _PANELS
    inner = sum((4 if i % 2 else 2) * math.cos(i * step) ** (freedom - 1) for i in range(1, _PANELS))
    return 0.5 + factor * (1 + inner + math.cos(angle) ** (freedom - 1)) * step / 3
