"""Metrics of reconstruction, and confidence intervals."""

from uae.metrics.unified_score import UnifiedScore, similarity

__all__ = ["UnifiedScore", "similarity"]
