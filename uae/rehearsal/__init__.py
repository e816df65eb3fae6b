"""Writes tiny random checkpoints in official layouts, with which every configuration can be rehearsed without a download."""
