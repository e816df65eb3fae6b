"""Two systems on the same images: their paired difference."""

from __future__ import annotations

from typing import Any

import numpy as np

from uae.bench.result import Score, score
from uae.metrics.intervals import bootstrap


def paired_difference(ours: dict[str, Any], other: dict[str, Any], resamples: int = 1000, seed: int = 0) -> dict[str, Score]:
    """Mean of ``ours - other`` over the sources that both results scored, with 95 % bootstrap intervals.

    Args:
        ours: Content of a result of ``uae.bench score``.
        other: Of another system.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.

    Returns:
        ``overall``, ``held_out`` and every encoder, in cosines; ``n`` is the number of sources in common.

    Raises:
        ValueError: They are of different benchmarks or encoders, or share no source image.
    """
    check_comparable(ours, other)
    theirs = {(row["name"], row["source_sha256"]): row["cosine"] for row in other["per_image"]}
    rows = [(row["cosine"], theirs[key]) for row in ours["per_image"] if (key := (row["name"], row["source_sha256"])) in theirs]
    if not rows:
        raise ValueError(f"{ours['system']!r} and {other['system']!r} have no source image in common (equal name and content)")
    names = list(ours["model_types"])
    gap_NE = np.array([[mine[name] - its[name] for name in names] for mine, its in rows])
    held_out = [names.index(name) for name in ours["backend"]["held_out"]]
    columns = {"overall": list(range(len(names)))} | ({"held_out": held_out} if held_out else {})
    columns |= {name: [i] for i, name in enumerate(names)}
    return {name: score(bootstrap(gap_NE[:, at].mean(1), resamples, seed), len(gap_NE)) for name, at in columns.items()}


def check_comparable(ours: dict[str, Any], other: dict[str, Any]) -> None:
    """Refuse results that cannot be compared; of ``ours`` only benchmark, system and backend are read.

    Raises:
        ValueError: They are of different benchmarks or encoders.
    """
    if not ours["benchmark"] == other["benchmark"] or "per_image" not in other:
        raise ValueError(
            f"{other['system']!r} has a result of {other['benchmark']!r}, {ours['system']!r} of {ours['benchmark']!r}; only results "
            "of uae.bench score with the same encoders are compared"
        )
    differing = [name for name in ours["backend"]["encoders"] if _mark(ours, name) != _mark(other, name)]
    if differing:
        raise ValueError(f"the two results were measured with different weights or preprocessing of {', '.join(differing)}")


def _mark(result: dict[str, Any], encoder: str) -> str | None:
    return result["backend"]["encoders"][encoder]["fingerprint"]
