"""Medians, spreads, percentiles, geometric means."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


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


@dataclass(frozen=True, kw_only=True)
class Summary:
    """How samples, such as the microseconds of a launch, are distributed."""

    avg: float
    min: float
    max: float
    std: float
    p50: float
    p90: float
    p95: float
    p99: float


def summary(values: Sequence[float]) -> Summary:
    """Raises :class:`ValueError` if there is none."""
    p50, p90, p95, p99 = (quantile(values, part) for part in (0.5, 0.9, 0.95, 0.99))
    return Summary(
        avg=sum(values) / len(values),
        min=min(values),
        max=max(values),
        std=deviation(values),
        p50=p50,
        p90=p90,
        p95=p95,
        p99=p99,
    )
