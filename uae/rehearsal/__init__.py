"""Tiny random checkpoints in official layouts: every configuration can be rehearsed without a download."""
