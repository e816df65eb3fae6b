"""An encoder without weights: where which colour is."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from uae.encoders.tower import check_images
from uae.types import ImageEncoder


class LayoutEncoder:
    """Mean colours on a grid, minus mid grey.

    Needs no download and shares nothing with any trained tower, which makes it a held-out encoder for small
    experiments: unrelated scenes score near 0, unlike under random or histogram features.

    Args:
        cells: Grid cells along each side; the embedding has ``3 * cells ** 2`` numbers in [-0.5, 0.5].
    """

    def __init__(self, cells: int = 12) -> None:
        if cells < 1:
            raise ValueError(f"cells={cells}; allowed: 1 or more; set the encoder's init_args.cells")
        self.cells = cells

    def load(self, device: Any = "cpu") -> ImageEncoder:
        """Nothing to load; returns itself."""
        return self

    def embed(self, images_NCHW: Tensor) -> Tensor:
        """float32 ``[N, 3 * cells ** 2]`` of float images ``[N, 3, H, W]`` in [0, 1]; 0 for mid grey."""
        check_images(images_NCHW)
        with torch.autocast(images_NCHW.device.type, enabled=False):
            return (F.adaptive_avg_pool2d(images_NCHW.float(), self.cells) - 0.5).flatten(1)

    def fingerprint(self) -> str:
        """What an embedding depends on."""
        return f"layout of {self.cells} x {self.cells} cells"
