"""The contract of a cold-start objective."""

from __future__ import annotations

import random
from pathlib import Path

from torch import Tensor, nn

from uae.types import ImageBatch


class Objective(nn.Module):
    """Holds the modules it trains as submodules, made in `build`; frozen ones are kept out of sight in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(0)
        self.step = 0  # optimizer steps so far; whoever trains keeps it

    def build(self) -> None:
        """Create or load the modules. Called once, on the CPU."""
        raise NotImplementedError

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """Scalars to log; ``"loss"`` is minimised. ``progress`` runs from 0 to 1 over the training."""
        raise NotImplementedError

    def score(self, batch: ImageBatch) -> dict[str, float]:
        """How good the modules are on held-out images; averaged over batches."""
        raise NotImplementedError

    def save(self, folder: Path) -> None:
        """Write the trained modules below ``folder`` in their library's layout."""
        raise NotImplementedError
