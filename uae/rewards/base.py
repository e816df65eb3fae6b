"""What every reward shares: rows belong to groups, and most have nothing to load."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor


class BaseReward(ABC):
    """Base of every reward that a config may name (``uae.types.Reward`` says what callers rely on).

    A class rather than the protocol because jsonargparse takes a protocol whose ``__call__`` returns a class for a
    factory of that class, and would ask for a Tensor in the YAML.
    """

    def load(self, device: Any = "cpu") -> BaseReward:
        """Load what it needs (once); returns itself."""
        return self

    @abstractmethod
    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """``reward_BG``, float32; NaN where there is none."""


def batch_and_group(sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> tuple[int, int]:
    """``(B, G)`` of one rollout.

    Raises:
        ValueError: N is not B * G with G >= 1, or there is not one text per reconstruction.
    """
    images, rows = len(sources_BCHW), len(reconstructions_NCHW)
    if not images or not rows or rows % images or len(texts) != rows:
        raise ValueError(
            f"a reward needs B sources, N = B*G reconstructions and N texts, got {images}, {rows} and {len(texts)}"
        )
    return images, rows // images
