"""A reward on the caption alone."""

from __future__ import annotations

import re

import torch
from torch import Tensor

from uae.rewards.base import BaseReward, batch_and_group


class CaptionFormat(BaseReward):
    """1 for a caption that has the wanted form, else 0: keeps the language from drifting into a private code.

    Args:
        pattern: Regular expression that has to match the whole caption, case and line breaks included.
    """

    def __init__(self, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"pattern={pattern!r} is no regular expression ({error}); set init_args.pattern"
            ) from error
        self.pattern = pattern

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """``reward_BG``, each 0.0 or 1.0."""
        shape = batch_and_group(sources_BCHW, reconstructions_NCHW, texts)
        matches = [float(re.fullmatch(self.pattern, text) is not None) for text in texts]
        return torch.tensor(matches, device=reconstructions_NCHW.device).view(shape)
