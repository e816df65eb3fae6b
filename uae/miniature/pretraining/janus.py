"""Joint supervised training of both directions of a tiny Janus: images to captions and captions to image tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uae.miniature.metrics.scenes import agreement
from uae.miniature.pretraining.captioning import CaptionObjective, CaptionStyle
from uae.miniature.pretraining.flow_matching import some_detail
from uae.miniature.scenes import Detail, Scene, describe, detect, render, sample_scene
from uae.miniature.scenes.world import KINDS, cell_codes
from uae.miniature.tiny_janus import WEIGHTS, assemble, load, save, scene_codes
from uae.models.tokens.conditions import TokenCondition
from uae.models.tokens.policy import TokenSampling
from uae.types import ImageBatch


class JanusObjective(CaptionObjective):
    """Cross-entropy of captions given images, and of image tokens given captions, in one model.

    Captions are asked for in a mixture of styles; images in every level of detail, so that what a caption leaves unsaid
    is left to chance. The number of objects to draw grows over the first quarter of the training. An auxiliary head
    reads every vision token's cell, also in crowded scenes; it teaches the tower and is thrown away. The autoencoder
    stays as it is.

    Args:
        styles: The mixture of captions. Few detailed ones, with mistakes, leave something for the reward to teach.
        reading: Weight of the auxiliary loss.
        dropout: Share of prompts without their caption (for guidance).
        detailed: Share of detailed captions to draw from; the rest leaves out some attributes.
        error: Chance, per said attribute of an object, that a caption to draw from states a random value. Captions that are
            wrong at times leave something for the reward to teach the decoder.
        start: Folder with a Janus whose autoencoder is trained; "package" is the package's own.
        drawn: Images to draw per image to describe.
        curriculum: Whether the number of objects to draw grows; False is all of them from the first step.
    """

    def __init__(
        self,
        styles: list[CaptionStyle],
        reading: float = 1.0,
        dropout: float = 0.1,
        detailed: float = 0.5,
        error: float = 0.0,
        start: str = "package",
        drawn: float = 1.0,
        curriculum: bool = True,
    ) -> None:
        super().__init__(styles, reading, start)
        self.dropout, self.detailed, self.error = dropout, detailed, error
        self.drawn, self.curriculum = drawn, curriculum

    def build(self) -> None:
        """The Janus that the autoencoder was trained in."""
        model, processor = load(WEIGHTS if self.start == "package" else Path(str(self.start)))
        self.sampling = TokenSampling(guidance=1.0)
        umm: Any = assemble(model, processor, self.sampling)
        self.policy = umm.captioner.learner.network
        self.reader = nn.Linear(model.config.text_config.hidden_size, KINDS)
        self.frozen, self.conditioner, self.renderer = (umm.captioner,), umm.conditioner, umm.renderer

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``caption``, ``image``: nats per token; ``reading``: nats per cell; ``loss``: all of them."""
        most = 3 if progress >= 0.25 or not self.curriculum else 2 if progress >= 0.1 else 1
        rows, counts = round(self.drawn * len(batch["scene"])), tuple(range(1, most + 1))
        caption = self._caption_loss(batch)
        image = self._image_loss([sample_scene(self.rng, counts) for _ in range(rows)])
        reading = self._reading_loss(batch["scene"])
        loss = caption + image + self.reading * reading
        return {"loss": loss, "caption": caption.detach(), "image": image.detach(), "reading": reading.detach()}

    def _caption_loss(self, batch: ImageBatch) -> Tensor:
        (captioner,) = self.frozen
        tokens_NT, mask_NT = self._tokens([self.caption(scene) for scene in batch["scene"]])
        logp_NT = self.policy(captioner.prepare(batch["image"]), tokens_NT, 1, 1.0, (mask_NT != 0).sum(1))
        return -logp_NT.masked_fill(mask_NT == 0, 0.0).sum() / mask_NT.sum()  # padding is banned: -inf

    def _image_loss(self, scenes: list[Scene]) -> Tensor:
        condition = self.prompts([self.request(scene) for scene in scenes])
        return -self.policy(condition, scene_codes(scenes), self.sampling).mean()

    def _reading_loss(self, scenes: list[Scene]) -> Tensor:
        scenes = [*scenes, *(sample_scene(self.rng, (5, 7, 9)) for _ in scenes)]
        images = render(scenes).to(self.policy.banned_ids.device)
        seen_NSD = self.policy.base.model.get_image_features(images * 2 - 1, return_dict=True).pooler_output
        return F.cross_entropy(self.reader(seen_NSD).flatten(0, 1), cell_codes(scenes).to(images.device).flatten())

    def prompts(self, captions: list[str]) -> TokenCondition:
        """Prompts of images, some without their caption."""
        condition: TokenCondition = self.conditioner.encode(captions)
        dropped_N1 = torch.tensor([[self.rng.random() < self.dropout] for _ in captions])
        return replace(condition, ids_NL=torch.where(dropped_N1, condition.uncond_ids_NL, condition.ids_NL))

    def request(self, scene: Scene) -> str:
        """What an image is asked for with. Tiny objects are left out only where nothing but color and shape is said."""
        shuffle = self.rng.random() < 0.3
        if self.rng.random() < self.detailed:
            return describe(scene, Detail(error=self.error, shuffle=shuffle), self.rng)
        return describe(scene, some_detail(self.rng, shuffle, self.error), self.rng)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """Samples at temperature 1: the captioner's scores, and the detector's on detailed ground-truth captions."""
        condition = self.conditioner.encode([describe(scene) for scene in batch["scene"]])
        images = self.renderer.render(condition, batch["id"].tolist())
        return {**super().score(batch), **agreement(detect(images), batch["scene"])}

    def save(self, folder: Path) -> None:
        """Write the Janus, autoencoder included."""
        save(folder, self.policy.base)
