"""Rewards that read the caption only: what they share, and one for its form."""

from __future__ import annotations

import re
from abc import abstractmethod

import torch
from torch import Tensor

from uae.rewards.base import BaseReward, batch_and_group


class CaptionReward(BaseReward):
    """One number for every caption, whatever the images are."""

    @abstractmethod
    def score(self, text: str) -> float:
        """The reward of one caption."""

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Rewards ``[B, G]``. The images are not looked at."""
        shape = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        return torch.tensor([self.score(text) for text in texts], device=reconstructions_NCHW.device).view(shape)


class CaptionFormat(CaptionReward):
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

    def score(self, text: str) -> float:
        """1.0 or 0.0."""
        return float(re.fullmatch(self.pattern, text) is not None)
