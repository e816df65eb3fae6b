"""Seconds per stage of a rollout, and who wants to know which stage begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

Listener = Callable[[str], None]
_LISTENERS: list[Listener] = []


class Stopwatch:
    """Measures seconds per stage. It waits for the GPU before and after a stage, so that each stage counts its own work.

    Args:
        seconds: What has been measured before, by stage; it is added to, in place.
    """

    def __init__(self, seconds: dict[str, float] | None = None) -> None:
        self.seconds = {} if seconds is None else seconds

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Measure a ``with`` block; the times of blocks with the same stage name are added up."""
        for listener in _LISTENERS:
            listener(stage)
        start = now()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now() - start


def tell(listener: Listener) -> Callable[[], None]:
    """Call ``listener`` with the name of every stage that begins in this process, whoever measures it.

    Returns:
        A function that ends this; it may be called twice.
    """
    _LISTENERS.append(listener)
    return lambda: _LISTENERS.remove(listener) if listener in _LISTENERS else None


def now() -> float:
    """Seconds on a monotonic clock, after the GPU has finished its queued work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
