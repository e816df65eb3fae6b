"""Similarity part by part, so that a small object counts."""

from __future__ import annotations

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from uae.rewards.similarity import EncoderSimilarity
from uae.types import ImageEncoder


class RegionSimilarity(EncoderSimilarity):
    """Mean cosine similarity of the tiles of a grid, each compared with the tile at the same place of the source.

    The cosine of two whole images hardly moves when one tiny object is wrong. A tile is enlarged to the encoder's own size,
    so an object fills more of it; and with a ``temperature`` the tiles that differ most count most. It costs
    ``tiles ** 2`` passes of the encoder per image, and cannot see what is cut by the border of a tile as a whole.

    Args:
        encoder: A frozen image encoder. Its own preprocessing is applied to every tile: an encoder that crops the centre
            does not see the rim of tiles that are not square.
        tiles: Number of tiles along each side of an image.
        temperature: Tile t weighs ``softmax(-cosine / temperature)[t]``. Cosines of tiles differ by about 0.1 to 0.5 under
            CLIP: at 0.05 the worst tile decides, at 1 nearly all count alike. None weighs all alike.
    """

    def __init__(self, encoder: ImageEncoder, tiles: PositiveInt = 3, temperature: PositiveFloat | None = None) -> None:
        super().__init__(encoder)
        self.tiles, self.temperature = tiles, temperature

    @torch.no_grad()
    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Weighted mean cosines ``[B, G]`` in [-1, 1]: 1 for equal images, NaN where a tile has no embedding (NaN pixels).

        Raises:
            ValueError: An image has fewer pixels along a side than there are tiles.
        """
        cosine_BGK = torch.stack(
            [
                super(RegionSimilarity, self).__call__(self._tile(sources_BCHW, place), self._tile(reconstructions_NCHW, place), texts)
                for place in range(self.tiles**2)
            ],
            dim=2,
        )
        if self.temperature is None:
            return cosine_BGK.mean(dim=2)
        weight_BGK: Tensor = (-cosine_BGK / self.temperature).softmax(dim=2)
        return (weight_BGK * cosine_BGK).sum(dim=2).clamp(-1, 1)

    def _tile(self, images_NCHW: Tensor, place: int) -> Tensor:
        """One tile of every image; tiles differ by one pixel where the size is no multiple of their number."""
        height, width = images_NCHW.shape[-2:]
        if min(height, width) < self.tiles:
            raise ValueError(
                f"tiles={self.tiles} along the side of an image of {height} x {width} pixels; allowed: up to "
                f"{min(height, width)}; lower the reward's init_args.tiles"
            )
        row, column = divmod(place, self.tiles)
        top, bottom = row * height // self.tiles, (row + 1) * height // self.tiles
        left, right = column * width // self.tiles, (column + 1) * width // self.tiles
        tile: Tensor = images_NCHW[..., top:bottom, left:right]
        return tile
