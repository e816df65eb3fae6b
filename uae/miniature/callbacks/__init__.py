"""Callbacks that log the miniature's own benchmarks."""
