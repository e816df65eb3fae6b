"""Agreement of judges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def krippendorff(units: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's alpha with squared differences (Krippendorff 2011): 1 is full agreement, 0 is agreement by chance.

    Args:
        units: For each compared pair, the scores that its judges gave; pairs may have different numbers of judges.

    Returns:
        None if no pair has two judges, or if all scores are equal.
    """
    judged = [values for values in units if len(values) > 1]
    pooled = [value for values in judged for value in values]
    expected = _spread(pooled) / (len(pooled) - 1) if pooled else 0.0
    observed = sum(_spread(values) / (len(values) - 1) for values in judged)
    return 1 - observed / expected if expected else None


def _spread(values: Sequence[float]) -> float:
    """The sum of squared differences over all ordered pairs."""
    return 2 * (len(values) * sum(value**2 for value in values) - sum(values) ** 2)
