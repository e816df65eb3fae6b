"""Paired difference between two systems on the source images that both reconstructed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uae.bench.paired import paired_differences, unlikeness
from uae.bench.result import Case, Score, cases_of, score
from uae.bench.score.similarities import Similarities, columns
from uae.metrics.intervals import Interval


def scored_cases(found: Similarities, held_out: Sequence[str]) -> dict[str, list[Case]]:
    """Cosines of all pairs for ``overall``, ``held_out`` and every encoder; a case is a source image, by name and content."""
    names = [f"{name} {source}" for name, (source, _) in zip(found.names, found.digests, strict=True)]
    return {
        title: [Case(name, value) for name, value in zip(names, found.cosine_NE[:, at].mean(1).tolist(), strict=True)]
        for title, at in columns(found.encoders, held_out).items()
    }


def paired_difference(
    cases: Mapping[str, Sequence[Case]], other: Mapping[str, Any], resamples: int = 1000, seed: int = 0
) -> dict[str, Score]:
    """Mean difference to another system over the source images that both scored, with 95 % bootstrap intervals.

    Args:
        cases: This system's cases, see `scored_cases`.
        other: Content of the other system's result, which `check_comparable` accepts.
        resamples: Number of bootstrap resamples.
        seed: Seed of the bootstrap.

    Returns:
        ``overall``, ``held_out`` and every encoder, as differences of cosines; ``n`` is the number of common source images.

    Raises:
        ValueError: No source image is in both results.
    """
    found = paired_differences(cases, cases_of(other), resamples, seed)
    if not found:
        raise ValueError(
            f"--compare: the result of {other['system']!r} has no source image in common with this one (equal name and content)"
        )
    return {name: score(Interval(gap.value, gap.low, gap.high), gap.n) for name, gap in found.items()}


def check_comparable(ours: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise unless two results can be compared; only ``benchmark``, ``system`` and ``backend`` of ``ours`` are read.

    Raises:
        ValueError: The results are of different benchmarks, or of different encoders.
    """
    if ours["benchmark"] != other["benchmark"] or "encoders" not in other.get("backend", {}):
        raise ValueError(
            f"--compare: {other['system']!r} has a result of {other['benchmark']!r}, {ours['system']!r} of "
            f"{ours['benchmark']!r}; only results of uae.bench score with the same encoders are compared"
        )
    if unlike := unlikeness(ours, other):
        raise ValueError(f"--compare: the two results were measured with {'; '.join(unlike)}; give a result of the same encoders")
