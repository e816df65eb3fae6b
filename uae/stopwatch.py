"""Seconds per stage of a rollout."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Seconds per stage. Waits for the device on both sides, so that every stage pays for its own work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time a ``with`` block; blocks of one stage add up."""
        start = now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now() - start


def now() -> float:
    """Seconds on a steady clock, once the device has finished what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
