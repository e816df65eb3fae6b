"""Checkpoints of a run: what is in them, how they are written, read and sharded."""
