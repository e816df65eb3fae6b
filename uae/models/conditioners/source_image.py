"""LEAKS: tokens of the source image itself, for editing models and ablation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from uae.models.conditioners.states import EmbeddingCondition, projected
from uae.types import Rollout


class SourceImageConditioner(nn.Module):
    """Patch features of the image a caption describes, through a projector (UniWorld-V1: SigLIP2, 512 pixels, 1024 tokens).

    This is **not** a text bottleneck: the renderer sees the picture it is to redraw, and the caption need not say anything.
    It is how UniWorld-V1 edits images; here it bounds from above what any caption could reach. Join it with a conditioner
    that reads the caption, see `uae.models.conditioners.joined`.

    Args:
        tower: A vision model such as ``SiglipVisionModel``: called with ``pixel_values``. Frozen.
        processor: Its image processor, which resizes to one size.
        projector: Maps ``[..., D]`` to the renderer's embedding width (UniWorld-V1's ``siglip_projector``: 1152 to 12288 to
            4096 with SiLU, see `uae.models.conditioners.states.mlp_projector`).
    """

    truncated = 0

    def __init__(self, tower: nn.Module, processor: Any, projector: nn.Module) -> None:
        super().__init__()
        self.tower, self.processor, self.projector = tower.requires_grad_(False).eval(), processor, projector

    def train(self, mode: bool = True) -> SourceImageConditioner:
        """The tower stays in eval mode."""
        super().train(mode)
        self.tower.eval()
        return self

    def encode(self, texts: list[str], rollout: Rollout | None = None) -> EmbeddingCondition:
        """The image of every caption, N rows. No pooled vector, nothing is padding.

        Raises:
            ValueError: Without a rollout, or with one of another number of captions.
        """
        if rollout is None:
            raise ValueError(
                "tokens of the source image need a rollout, and there is none: leave this conditioner out to draw from "
                "captions alone"
            )
        if len(texts) != len(rollout):
            raise ValueError(f"{len(texts)} captions, but the rollout has {len(rollout)}")
        context: Any = rollout.context  # `Context` is opaque; the captioners of this package keep their images in it
        features_BLD = self._features(context.images)
        condition = projected(self.projector, features_BLD, features_BLD.new_ones(features_BLD.shape[:2]).long(), "none")
        return condition.index([image for image in range(len(condition)) for _ in range(rollout.group)])

    @torch.no_grad()
    def _features(self, images: tuple[Tensor, ...]) -> Tensor:
        """Last hidden states ``[B, L, D]`` of B images ``[3, H, W]`` in [0, 1], each once however many captions it has."""
        pictures = [(image.clamp(0, 1) * 255).round().to(torch.uint8).cpu() for image in images]
        pixels = self.processor(images=pictures, return_tensors="pt")["pixel_values"]
        weight = next(self.tower.parameters())
        return self.tower(pixel_values=pixels.to(weight.device, weight.dtype)).last_hidden_state
