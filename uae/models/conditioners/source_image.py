"""LEAKS: features of the source image as a condition. For models that edit images, and for ablations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uae.models.conditioners.states import EmbeddingCondition, projected
from uae.types import Rollout


class SourceImageConditioner(nn.Module):
    """Projects patch features of the image that a caption describes (UniWorld-V1: SigLIP2, 512 pixels, 1024 tokens).

    This is **not** a text bottleneck: the renderer sees the image that it has to redraw, even if the caption is empty.
    UniWorld-V1 edits images this way. In this project it gives an upper bound on the reward of any caption. Join it with a
    conditioner that reads the caption, see `uae.models.conditioners.joined`.

    Args:
        tower: Vision model that takes ``pixel_values``, such as ``SiglipVisionModel``. It is frozen.
        processor: Image processor of the tower, which resizes all images to one size.
        projector: Network from features ``[..., D]`` to the renderer's embedding width (UniWorld-V1's ``siglip_projector``
            has widths 1152, 12288 and 4096 and SiLU, see `uae.models.conditioners.states.mlp_projector`).
    """

    truncated = 0

    def __init__(self, tower: nn.Module, processor: Any, projector: nn.Module) -> None:
        super().__init__()
        self.tower, self.processor, self.projector = tower.requires_grad_(False).eval(), processor, projector

    def train(self, mode: bool = True) -> SourceImageConditioner:
        """Switch the projector between training and eval mode. The tower stays in eval mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def encode(self, texts: list[str], rollout: Rollout[Any] | None = None) -> EmbeddingCondition:
        """Projected features of the source image of each caption, N rows without padding and without pooled vectors.

        Args:
            texts: The N captions of the rollout. Only their number is used.
            rollout: The rollout that wrote the captions.

        Raises:
            ValueError: There is no rollout, or it has another number of captions.
        """
        if rollout is None:
            raise ValueError(
                "tokens of the source image need a rollout, and there is none: leave this conditioner out to draw from captions alone"
            )
        if len(texts) != len(rollout):
            raise ValueError(f"{len(texts)} captions, but the rollout has {len(rollout)}")
        features_BLD = self._features(rollout.context.images)
        condition = projected(self.projector, features_BLD, features_BLD.new_ones(features_BLD.shape[:2]).long(), "none")
        return condition.index([image for image in range(len(condition)) for _ in range(rollout.group)])

    @torch.no_grad()
    def _features(self, images: tuple[Tensor, ...]) -> Tensor:
        """Last hidden states ``[B, L, D]`` of B images ``[3, H, W]`` in [0, 1]."""
        pictures = [(image.clamp(0, 1) * 255).round().to(torch.uint8).cpu() for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        weight = next(self.tower.parameters())
        return self.tower(pixel_values=pixels.to(weight.device, weight.dtype)).last_hidden_state
