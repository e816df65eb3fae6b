"""Similarity part by part, so that a small object counts."""

from __future__ import annotations

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt
from torch import Tensor

from uae.encoders import similarity
from uae.rewards.base import BaseReward, batch_and_group
from uae.types import ImageEncoder


class RegionSimilarity(BaseReward):
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
        self.encoder, self.tiles, self.temperature = encoder, tiles, temperature

    @property
    def encoders(self) -> dict[str, ImageEncoder]:
        """The one encoder, under the name "encoder"."""
        return {"encoder": self.encoder}

    def load(self, device: torch.device | str = "cpu") -> RegionSimilarity:
        """Load the encoder and move it to ``device``; returns the reward itself."""
        self.encoder.load(device)
        return self

    @torch.no_grad()
    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Weighted mean cosines ``[B, G]`` in [-1, 1]: 1 for equal images, NaN where a tile has no embedding (NaN pixels).

        Raises:
            ValueError: An image has fewer pixels along a side than there are tiles.
        """
        batch, group = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        cosines = []
        for place in range(self.tiles**2):
            source_BD = self.encoder.embed(self._tile(sources_BCHW, place))
            reconstruction_ND = self.encoder.embed(self._tile(reconstructions_NCHW, place))
            cosines.append(similarity(source_BD.repeat_interleave(group, dim=0), reconstruction_ND))
        cosine_NK = torch.stack(cosines, dim=1)
        if self.temperature is None:
            return cosine_NK.mean(dim=1).view(batch, group)
        weight_NK: Tensor = (-cosine_NK / self.temperature).softmax(dim=1)
        return (weight_NK * cosine_NK).sum(dim=1).clamp(-1, 1).view(batch, group)

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
