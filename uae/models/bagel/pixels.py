"""Pixels to patches: how BAGEL scales an image that it reads, and in which order it takes the numbers of a patch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scaling:
    """How an image is scaled before the image tower sees it. The defaults are those of the official benchmarks.

    Args:
        longest: Largest side in pixels.
        shortest: Smallest side in pixels, unless ``longest`` forbids it.
        patch: Side of a patch in pixels, of which both sides become multiples.
        most: Largest area in pixels.
    """

    longest: int = 980
    shortest: int = 378
    patch: int = 14
    most: int = 2007040

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image is scaled to.

        An image that is too large is shrunk by the ratio of *areas*, which is more than needed. The model was trained so.
        """
        scale = min(self.longest / max(height, width), 1.0)
        scale = max(scale, self.shortest / min(height, width))
        height, width = self._scaled(height, width, scale)
        if height * width > self.most:
            height, width = self._scaled(height, width, self.most / (height * width))
        if max(height, width) > self.longest:
            height, width = self._scaled(height, width, self.longest / max(height, width))
        return height, width

    def _scaled(self, height: int, width: int, scale: float) -> tuple[int, int]:
        sides = (round(round(side * scale) / self.patch) * self.patch for side in (height, width))
        height, width = (max(self.patch, side) for side in sides)
        return height, width


def scaled(image_CHW: Tensor, scaling: Scaling) -> Tensor:
    """An image ``[3, H, W]`` in [0, 1] as the tower sees it: rounded to 8 bits, scaled bicubically, in [-1, 1].

    The smallest image is one patch.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as TF

    picture = TF.to_pil_image((image_CHW.clamp(0, 1) * 255).round().to(torch.uint8).cpu())
    resized = TF.resize(picture, list(scaling.size(picture.height, picture.width)), InterpolationMode.BICUBIC)
    return (TF.to_tensor(resized) - 0.5) / 0.5


def patches(image_CHW: Tensor, side: int) -> Tensor:
    """The patches of an image, row by row: ``[rows * columns, side * side * C]``, the channel last."""
    C = len(image_CHW)
    cells = image_CHW.unflatten(2, (-1, side)).unflatten(1, (-1, side))  # C, rows, side, columns, side
    return cells.permute(1, 3, 2, 4, 0).reshape(-1, side * side * C)


def unpatched(patches_NLP: Tensor, rows: int, side: int) -> Tensor:
    """Images ``[N, C, H, W]`` of which `patches` would make ``[N, L, P]``."""
    N, L, P = patches_NLP.shape
    cells = patches_NLP.reshape(N, rows, L // rows, side, side, P // side**2)
    return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def places(rows: int, columns: int, side: int, device: torch.device | str = "cpu") -> Tensor:
    """Numbers ``[rows * columns]`` of the places of a grid in a square table of ``side`` x ``side`` places."""
    row, column = torch.arange(rows, device=device), torch.arange(columns, device=device)
    return (row[:, None] * side + column).flatten()
