"""The paper's reward: how similar the source and its reconstruction look to a frozen image encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from uae.encoders import similarity
from uae.rewards.base import BaseReward, batch_and_group
from uae.types import ImageEncoder


class EncoderSimilarity(BaseReward):
    """Cosine similarity of source and reconstruction under one encoder (arXiv 2509.09666; the paper uses CLIP).

    Args:
        encoder: A frozen image encoder. A policy learns to please the encoder it is rewarded by, so report the scores of
            at least one other encoder, too (``held_out`` of `uae.metrics.UnifiedScore`).
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        self.encoder = encoder

    @property
    def encoders(self) -> dict[str, ImageEncoder]:
        """The one encoder, under the name "encoder"."""
        return {"encoder": self.encoder}

    def load(self, device: torch.device | str = "cpu") -> EncoderSimilarity:
        """Load the encoder and move it to ``device``; returns the reward itself."""
        self.encoder.load(device)
        return self

    @torch.no_grad()
    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Cosines ``[B, G]`` in [-1, 1]: 1 for equal images, NaN where an image has no embedding (NaN pixels)."""
        batch, group = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        source_BD = self.encoder.embed(sources_BCHW)  # once per image, not once per caption
        reconstruction_ND = self.encoder.embed(reconstructions_NCHW)
        return similarity(source_BD.repeat_interleave(group, dim=0), reconstruction_ND).view(batch, group)
