"""Rewards for control runs: one without information, and one that is easily cheated."""

from __future__ import annotations

import torch
from torch import Tensor

from uae.rewards.base import BaseReward, batch_and_group
from uae.rewards.caption import CaptionReward


class RandomReward(BaseReward):
    """Uniform noise that depends on neither images nor captions.

    Every claim that a reward taught something needs a run with this one beside it: what improves here improves for
    another reason.

    Args:
        low: Smallest reward.
        high: Upper end of the rewards, which are below it; at least ``low``.
        seed: Seed of the noise. Every process draws the same numbers, and a resumed run draws them from the beginning.

    Raises:
        ValueError: ``low`` is above ``high``.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, seed: int = 0) -> None:
        if low > high:
            raise ValueError(f"low={low} is above high={high}; lower the reward's init_args.low or raise its init_args.high")
        self.low, self.high, self.seed = low, high, seed
        self._stream: torch.Generator | None = None

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Rewards ``[B, G]`` in [low, high)."""
        self._stream = self._stream or torch.Generator().manual_seed(self.seed)
        noise = torch.rand(batch_and_group(sources_BCHW, reconstructions_NCHW, texts), generator=self._stream)
        return (self.low + (self.high - self.low) * noise).to(reconstructions_NCHW.device)


class CaptionLength(CaptionReward):
    """Words of the caption, and nothing else: a reward that is easily cheated, to see what the callbacks that watch a run make of it.

    Args:
        words: Number of words from which on a caption gets 1.

    Raises:
        ValueError: ``words`` is below 1.
    """

    def __init__(self, words: int = 32) -> None:
        if words < 1:
            raise ValueError(f"words={words}; allowed: 1 or more; set the reward's init_args.words")
        self.words = words

    def score(self, text: str) -> float:
        """The share of ``words`` that the caption has, in [0, 1]."""
        return min(1.0, len(text.split()) / self.words)
