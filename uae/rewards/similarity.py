"""The paper's reward: how similar source and reconstruction look to a frozen encoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uae.encoders import similarity
from uae.rewards.base import BaseReward, batch_and_group
from uae.types import ImageEncoder


class EncoderSimilarity(BaseReward):
    """Cosine of source and reconstruction under one encoder (arXiv 2509.09666: CLIP).

    Args:
        encoder: A frozen image encoder. Report at least one other encoder that is not rewarded.
    """

    def __init__(self, encoder: ImageEncoder) -> None:
        self.encoder = encoder

    def load(self, device: Any = "cpu") -> EncoderSimilarity:
        """Load the encoder; returns itself."""
        self.encoder.load(device)
        return self

    @torch.no_grad()
    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """``reward_BG`` in [-1, 1], 1 for identity; NaN where an image has no embedding (NaN pixels)."""
        batch, group = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        source_BD = self.encoder.embed(sources_BCHW)  # once per image, not once per caption
        reconstruction_ND = self.encoder.embed(reconstructions_NCHW)
        return similarity(source_BD.repeat_interleave(group, dim=0), reconstruction_ND).view(batch, group)
