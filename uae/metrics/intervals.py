"""How sure a number is: 95 % confidence intervals of means and shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = (0.025, 0.975)
_Z = 1.959963984540054  # the normal quantile of LEVEL


class Interval(NamedTuple):
    """An estimate and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(values_N: np.ndarray, resamples: int = 1000, seed: int = 0, clusters_N: np.ndarray | None = None) -> Interval:
    """Percentile bootstrap of a mean.

    Args:
        values_N: One finite number per case, at least one.
        resamples: How often cases are drawn again, with replacement.
        seed: Equal seeds draw equal cases, also for other values: differences of paired means are paired.
        clusters_N: Cases of equal value (an image, a prompt) are drawn together; the mean stays that of the cases.
    """
    means = resampled_means(values_N, resamples, seed, clusters_N)
    low, high = np.quantile(means, LEVEL)
    return Interval(float(np.mean(values_N, dtype=np.float64)), float(low), float(high))


def mean_of_means(groups: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = 1000, seed: int = 0) -> Interval:
    """The unweighted mean of the means of groups (tasks of a benchmark), whose cases are drawn apart.

    Args:
        groups: Values and clusters of each, see `bootstrap`.
        resamples: As there.
        seed: As there.
    """
    draws = [
        resampled_means(values_N, resamples, seed + place, clusters_N)
        for place, (values_N, clusters_N) in enumerate(groups)
    ]
    low, high = np.quantile(np.mean(draws, axis=0), LEVEL)
    value = np.mean([np.mean(values_N, dtype=np.float64) for values_N, _ in groups])
    return Interval(float(value), float(low), float(high))


def resampled_means(
    values_N: np.ndarray, resamples: int = 1000, seed: int = 0, clusters_N: np.ndarray | None = None
) -> np.ndarray:
    """The means of cases drawn again, see `bootstrap`."""
    values_N = np.asarray(values_N, dtype=np.float64)
    totals_C, sizes_C = values_N, np.ones(len(values_N))
    if clusters_N is not None:
        _, place_N = np.unique(clusters_N, return_inverse=True)
        totals_C, sizes_C = np.bincount(place_N, values_N), np.bincount(place_N).astype(np.float64)
    draw, means = np.random.default_rng(seed), np.empty(resamples)
    for i in range(resamples):
        chosen_C = draw.integers(len(totals_C), size=len(totals_C))
        means[i] = totals_C[chosen_C].sum() / sizes_C[chosen_C].sum()
    return means


def wilson(successes: float, n: int) -> Interval:
    """Of a share, from how many of ``n`` cases succeeded; sound for few cases and for shares near 0 or 1 (Wilson 1927)."""
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    share, spread = successes / n, _Z**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
