"""A reward that reads the caption only."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from uae.rewards.base import BaseReward, batch_and_group


class CaptionFormat(BaseReward):
    """1 for a caption of the wanted form, and 0 for any other.

    A small weight keeps captions readable: without it, a policy may drift into a language that only the renderer
    understands.

    Args:
        pattern: Regular expression that the whole caption has to match. Case and line breaks count.

    Raises:
        ValueError: ``pattern`` is no regular expression.
    """

    def __init__(self, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"pattern={pattern!r} is no regular expression ({error}); correct the reward's init_args.pattern"
            ) from error
        self.pattern = pattern

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Rewards ``[B, G]``, each 0.0 or 1.0."""
        shape = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        matches = [float(re.fullmatch(self.pattern, text) is not None) for text in texts]
        return torch.tensor(matches, device=reconstructions_NCHW.device).view(shape)
