"""Differences between two systems over the cases that both results have, with paired intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uae.bench.result import Case, by_group
from uae.metrics.intervals import bootstrap, mean_of_means

BENCHMARK_INPUTS = ("questions", "prompts", "prompt", "judges", "csv")  # of the inputs, those that are not the system's own
NOT_COMPARED = ("device",)  # settings of a backend that do not change a score


class Difference(NamedTuple):
    """One system's mean minus another's over their common cases, in the units of the score.

    Args:
        value: Difference of the means.
        low: Lower end of its paired 95 % interval.
        high: Upper end of that interval.
        n: Number of common cases.
        p: p-value of `sign_test` where cases are 0 or 1 and independent, else None.
    """

    value: float
    low: float
    high: float
    n: int
    p: float | None = None


def sign_test(more: int, fewer: int) -> float:
    """Two-sided p-value of the exact binomial test that both outcomes are equally likely.

    Over changes from wrong to right and from right to wrong this is McNemar's exact test (McNemar 1947); over wins and losses it
    is the sign test.

    Args:
        more: Number of cases with the one outcome.
        fewer: Number of cases with the other; the order of the two does not matter.
    """
    from scipy.stats import binomtest

    n = more + fewer
    return float(binomtest(more, n).pvalue) if n else 1.0


def unlikeness(ours: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Why two results of one benchmark must not be subtracted: each encoder, detector, judge, prompt or question that differs.

    Encoders are compared by the fingerprints of their weights and preprocessing, every other setting by its value.
    """
    mine, its = (dict(result.get("backend", {})) for result in (ours, other))
    encoders, others = mine.pop("encoders", {}), its.pop("encoders", {})
    weights = [name for name in {**encoders, **others} if _fingerprint(encoders, name) != _fingerprint(others, name)]
    reasons = [f"different weights or preprocessing of {', '.join(weights)}"] if weights else []
    names = [name for name in sorted({*mine, *its}) if name not in NOT_COMPARED and mine.get(name) != its.get(name)]
    reasons += [f"other {name} ({_short(mine.get(name))}, {_short(its.get(name))})" for name in names]
    mine, its = (result.get("inputs", {}) for result in (ours, other))
    return reasons + [f"other {name}" for name in BENCHMARK_INPUTS if name in mine and name in its and mine[name] != its[name]]


def paired_differences(
    ours: Mapping[str, Sequence[Case]], other: Mapping[str, Sequence[Case]], resamples: int = 1000, seed: int = 0
) -> dict[str, Difference]:
    """Difference of every score of which both systems have common cases.

    Args:
        ours: One system's cases, by score, see `uae.bench.result.cases_of`.
        other: Another system's, of the same benchmark.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap; equal seeds draw equal cases for all scores.
    """
    found = {name: paired_difference(ours[name], other[name], resamples, seed) for name in ours if name in other}
    return {name: difference for name, difference in found.items() if difference is not None}


def paired_difference(ours: Sequence[Case], other: Sequence[Case], resamples: int = 1000, seed: int = 0) -> Difference | None:
    """Difference of two systems' means over their common cases.

    Returns:
        None if a group has no common case: the mean over groups would be another one than the score's.
    """
    theirs = {case.name: case.value for case in other}
    gaps: list[tuple[np.ndarray, np.ndarray]] = []
    binary = True
    for group in by_group(ours).values():
        pairs = [(case, theirs[case.name]) for case in sorted(group, key=lambda case: case.name) if case.name in theirs]
        if not pairs:
            return None
        binary = binary and {value for case, value in pairs} | {case.value for case, _ in pairs} <= {0, 1}
        gap_N = np.array([case.value - value for case, value in pairs], dtype=np.float64)
        gaps.append((gap_N, np.array([case.cluster or case.name for case, _ in pairs])))
    if not gaps:
        return None
    n = sum(len(gap_N) for gap_N, _ in gaps)
    if len(gaps) > 1:
        return Difference(*mean_of_means(gaps, resamples, seed), n)
    gap_N, cluster_N = gaps[0]
    independent = len(np.unique(cluster_N)) == n
    p = sign_test(int((gap_N > 0).sum()), int((gap_N < 0).sum())) if binary and independent else None
    return Difference(*bootstrap(gap_N, resamples, seed, cluster_N), n, p)


def _fingerprint(encoders: Mapping[str, Mapping[str, Any]], name: str) -> str | None:
    return encoders[name]["fingerprint"] if name in encoders else None


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
