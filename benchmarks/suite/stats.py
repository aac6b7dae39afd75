"""Medians, spreads, geometric means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def quantile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` (0 to 1) of the sorted values lie below, interpolated linearly."""
    if not values:
        raise ValueError("no values")
    if not 0 <= part <= 1:
        raise ValueError(f"part is {part}: expected 0 to 1")
    ordered = sorted(values)
    place = part * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def iqr(values: Sequence[float]) -> float:
    """The interquartile range."""
    return quantile(values, 0.75) - quantile(values, 0.25)


def geometric_mean(values: Iterable[float]) -> float:
    """NaN if there is none; all must be above 0."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def deviation(values: Sequence[float]) -> float:
    """The sample's standard deviation, 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
