"""The base class of a cold-start objective."""

from __future__ import annotations

import random
from pathlib import Path

from torch import Tensor, nn

from uae.types import ImageBatch


class Objective(nn.Module):
    """A supervised loss with the modules that it trains.

    `build` creates the modules. Those that train are submodules; frozen ones are kept in a tuple, so that neither
    Lightning nor the optimizer finds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)
        self.step = 0  # optimizer steps so far; ColdStart sets it before every call

    def build(self) -> None:
        """Create or load the modules. Called once, on the CPU."""
        raise NotImplementedError

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """Scalars to log, of which ``"loss"`` is minimised. ``progress`` is the share of all steps done, from 0 to 1."""
        raise NotImplementedError

    def score(self, batch: ImageBatch) -> dict[str, float]:
        """Quality of the modules on a batch of held-out images, by name; the caller averages over batches."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the trained modules below ``folder``, each in the layout of its own library."""
        raise NotImplementedError
