"""95 % confidence intervals of means and of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

LEVEL = (0.025, 0.975)  # the two quantiles that an interval of 95 % lies between
BLOCK = 2**16  # about how many cases are drawn at a time; at least those of one resample
_Z = 1.959963984540054  # the quantile LEVEL[1] of the normal distribution


class Interval(NamedTuple):
    """An estimate and the two ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def bootstrap(values_N: np.ndarray, resamples: int = 1000, seed: int = 0, clusters_N: np.ndarray | None = None) -> Interval:
    """The mean of some numbers, with the interval of the percentile bootstrap (Efron 1979).

    Args:
        values_N: One finite number per case, ``[N]`` with N >= 1.
        resamples: How often N cases are drawn again, with replacement.
        seed: Seed of the draws. With equal seeds the same cases are drawn, also for other values, so that the difference
            of two means can be taken draw by draw.
        clusters_N: A label per case, ``[N]``, e.g. the image that it is about. Cases with equal labels depend on each
            other and are drawn together; the estimate stays the mean over cases. None draws every case on its own.
    """
    means = resampled_means(values_N, resamples, seed, clusters_N)
    low, high = np.quantile(means, LEVEL)
    return Interval(float(np.mean(values_N, dtype=np.float64)), float(low), float(high))


def mean_of_means(groups: Sequence[tuple[np.ndarray, np.ndarray]], resamples: int = 1000, seed: int = 0) -> Interval:
    """The unweighted mean of the means of several groups, such as the tasks of a benchmark.

    Args:
        groups: For every group its ``values_N`` and ``clusters_N``, see `bootstrap`. Each group is drawn on its own.
        resamples: How often the cases of every group are drawn again, with replacement.
        seed: Seed of the draws of the first group; the following groups have the following seeds.
    """
    draws = [resampled_means(values_N, resamples, seed + place, clusters_N) for place, (values_N, clusters_N) in enumerate(groups)]
    low, high = np.quantile(np.mean(draws, axis=0), LEVEL)
    value = np.mean([np.mean(values_N, dtype=np.float64) for values_N, _ in groups])
    return Interval(float(value), float(low), float(high))


def resampled_means(values_N: np.ndarray, resamples: int = 1000, seed: int = 0, clusters_N: np.ndarray | None = None) -> np.ndarray:
    """The means float64 ``[resamples]`` of cases drawn again; the arguments are those of `bootstrap`."""
    values_N = np.asarray(values_N, dtype=np.float64)
    totals_C, sizes_C = values_N, None
    if clusters_N is not None:
        _, place_N = np.unique(clusters_N, return_inverse=True)
        totals_C, sizes_C = np.bincount(place_N, values_N), np.bincount(place_N)
    draw, means, C = np.random.default_rng(seed), np.empty(resamples), len(totals_C)
    at_once = max(1, BLOCK // C)
    for first in range(0, resamples, at_once):
        chosen_RC = draw.integers(C, size=(min(at_once, resamples - first), C))
        sizes_R = C if sizes_C is None else sizes_C[chosen_RC].sum(1)
        means[first : first + at_once] = totals_C[chosen_RC].sum(1) / sizes_R
    return means


def wilson(successes: float, n: int) -> Interval:
    """The share of successes, with Wilson's interval (1927), which is sound for few cases and for shares near 0 or 1.

    Args:
        successes: The number of cases that succeeded, in [0, n]; it may be a sum of fractions.
        n: The number of cases. Of 0 cases the share is NaN and the interval [0, 1].
    """
    if n == 0:
        return Interval(math.nan, 0.0, 1.0)
    share, spread = successes / n, _Z**2 / n
    centre = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
