"""An encoder without weights, which sees where the colours of an image are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from torch import Tensor

from uae.encoders.tower import check_images
from uae.types import ImageEncoder


class LayoutEncoder:
    """Mean colours of the cells of a grid, minus 0.5.

    It needs no download and has nothing in common with any trained tower, so it can be the held-out encoder of a small
    experiment. Mid grey becomes 0, so the cosine of two unrelated scenes is near 0; under random features or colour
    histograms it would be near 1.

    Args:
        cells: Number of grid cells along each side of the image. The embedding has ``3 * cells ** 2`` numbers in
            [-0.5, 0.5].
    """

    def __init__(self, cells: PositiveInt = 12) -> None:
        self.cells = cells

    def load(self, device: torch.device | str = "cpu") -> ImageEncoder:
        """Do nothing, as there are no weights; returns the encoder itself."""
        return self

    def embed(self, images_NCHW: Tensor) -> Tensor:
        """Embed float images ``[N, 3, H, W]`` in [0, 1] as float32 ``[N, 3 * cells ** 2]``.

        Raises:
            ValueError: The images are not float ``[N, 3, H, W]``.
        """
        check_images(images_NCHW)
        with torch.autocast(images_NCHW.device.type, enabled=False):
            return (F.adaptive_avg_pool2d(images_NCHW.float(), self.cells) - 0.5).flatten(1)

    def fingerprint(self) -> str:
        """A text that is equal for two encoders if and only if they compute the same embeddings."""
        return f"layout of {self.cells} x {self.cells} cells"
