"""Means with confidence intervals over seeds, and paired comparisons by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_dml.study.running.storage import needed

CONFIDENCE = 0.95
ROUNDING = 1e-6  # of the values: a metric is a mean in float32


@dataclass(frozen=True)
class Mean:
    """Mean of n values and the bounds of its 95% confidence interval, which are nan for n below 2."""

    n: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Paired t test: the mean difference, its 95% confidence interval, and the two-sided p value.

    p is nan for fewer than two pairs, and where all differences are the same but for rounding, as they then have no
    spread to test by; nor has the interval one then.
    """

    difference: Mean
    p: float


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and interval by Student's t distribution.

    Examples:
        >>> mean = mean_of([1.0, 2.0, 3.0])
        >>> mean.n, round(mean.mean, 3), round(mean.low, 3), round(mean.high, 3)
        (3, 2.0, -0.484, 4.484)
    """
    n = len(values)
    if n == 0:
        return Mean(0, math.nan, math.nan, math.nan)
    mean = math.fsum(values) / n
    if n == 1:
        return Mean(1, mean, math.nan, math.nan)
    half = float(needed("scipy.stats").t.ppf(0.5 + CONFIDENCE / 2, n - 1)) * _error_of_mean(values, mean)
    return Mean(n, mean, mean - half, mean + half)


def compare(values: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison:
    """Compares by the seeds that both have.

    Differences that are equal but for rounding have neither an interval nor a p value.

    Args:
        values: by seed.
        baseline: by seed.

    Examples:
        >>> comparison = compare({0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.5, 1: 1.0, 2: 2.0, 3: 9.0})
        >>> comparison.difference.n, round(comparison.difference.mean, 3), round(comparison.p, 3)
        (3, 1.167, 0.118)
    """
    differences = [values[seed] - baseline[seed] for seed in sorted(values.keys() & baseline.keys())]
    difference = mean_of(differences)
    shared = values.keys() & baseline.keys()
    size = max([abs(by_seed[seed]) for by_seed in (values, baseline) for seed in shared], default=0.0)
    if difference.n < 2 or max(differences) - min(differences) <= ROUNDING * size:
        # Equal but for rounding: their spread tells nothing of the seeds.
        return Comparison(Mean(difference.n, difference.mean, math.nan, math.nan), math.nan)
    t = difference.mean / _error_of_mean(differences, difference.mean)
    return Comparison(difference, 2 * float(needed("scipy.stats").t.sf(abs(t), difference.n - 1)))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for their number by Holm's method (Scandinavian Journal of Statistics 6, 1979); nan stays nan.

    Examples:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(order) - rank)))
        adjusted[place] = largest
    return adjusted


def _error_of_mean(values: Sequence[float], mean: float) -> float:
    n = len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1) / n)
