"""The base class of all rewards, and the check of shapes that they share."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from uae.types import ImageEncoder


class BaseReward(ABC):
    """A number per reconstruction; the higher, the better. A configuration names a subclass by its ``class_path``.

    A new reward only has to define ``__call__``. This is an abstract class and not a protocol, because jsonargparse takes
    a protocol with a ``__call__`` for the type of a function, and would not build an instance of it.
    """

    @property
    def encoders(self) -> dict[str, ImageEncoder]:
        """The image encoders that the reward compares images with, by name. Most rewards use none."""
        return {}

    def load(self, device: torch.device | str = "cpu") -> BaseReward:
        """Load everything that the reward computes with and move it to ``device``; returns the reward itself.

        The base class has nothing to load. Calling it again only moves what is already loaded.
        """
        return self

    @abstractmethod
    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Tensor:
        """Score the reconstructions of one batch.

        Args:
            sources_BCHW: The B original images, float ``[B, 3, H, W]`` in [0, 1].
            reconstructions_NCHW: N = B * G redrawn images, float ``[N, 3, H', W']`` in [0, 1]. Row n belongs to source
                n // G.
            texts: The N captions that the reconstructions were drawn from.

        Returns:
            Rewards float32 ``[B, G]``; NaN where a reconstruction cannot be scored.
        """


def batch_and_group(sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> tuple[int, int]:
    """The numbers B of images and G of captions per image of one call of a reward.

    Raises:
        ValueError: N is not B * G for a whole number G >= 1, or the number of texts is not N.
    """
    images, rows = len(sources_BCHW), len(reconstructions_NCHW)
    if not images or not rows or rows % images or len(texts) != rows:
        raise ValueError(f"a reward needs B sources, N = B*G reconstructions and N texts, got {images}, {rows} and {len(texts)}")
    return images, rows // images
