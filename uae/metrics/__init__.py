"""Metrics of reconstruction, and confidence intervals."""

from uae.metrics.once import Once, part_of
from uae.metrics.unified_score import UnifiedScore, similarity

__all__ = ["Once", "UnifiedScore", "part_of", "similarity"]
