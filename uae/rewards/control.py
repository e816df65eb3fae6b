"""The control every claim of learning needs: a reward that knows nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from uae.rewards.base import BaseReward, batch_and_group


class RandomReward(BaseReward):
    """Uniform noise, whatever the images. A policy that improves under it improves for another reason.

    Args:
        low: Smallest reward.
        high: Largest reward.
        seed: Starts the stream; every process draws the same one, and a resumed run starts it again.
    """

    def __init__(self, low: float = 0.0, high: float = 1.0, seed: int = 0) -> None:
        if low > high:
            raise ValueError(f"low={low} is above high={high}; set the reward's init_args.low and init_args.high")
        self.low, self.high, self.seed = low, high, seed
        self._stream: torch.Generator | None = None

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """``reward_BG`` in [low, high)."""
        self._stream = self._stream or torch.Generator().manual_seed(self.seed)
        noise = torch.rand(batch_and_group(sources_BCHW, reconstructions_NCHW, texts), generator=self._stream)
        return (self.low + (self.high - self.low) * noise).to(reconstructions_NCHW.device)
