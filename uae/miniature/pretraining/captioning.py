"""Supervised fine-tuning of a captioner on images and captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uae.coldstart.objective import Objective
from uae.miniature.scenes import Detail, Scene, describe, parse
from uae.miniature.scenes.world import KINDS, cell_codes
from uae.miniature.tiny import INSTRUCTION, WEIGHTS, create_captioner, load_captioner, processor
from uae.models.captioners.captioner import HFCaptioner
from uae.types import ImageBatch, Sampling


@dataclass(frozen=True)
class CaptionStyle:
    """How often the cold-start data uses a level of detail.

    Args:
        share: Relative frequency of such captions.
        detail: What such a caption says, and how reliably.
    """

    share: float
    detail: Detail = field(default_factory=Detail)


class CaptionObjective(Objective):
    """Cross-entropy of captions (paper: the cold start of the encoder), with an auxiliary reading of the image tokens.

    The auxiliary head predicts what each image token's cell holds; it teaches the image tower and is thrown away.

    Args:
        styles: The mixture of captions. Few detailed ones, with mistakes, leave something for the reward to teach.
        reading: Weight of the auxiliary loss.
        start: Folder of weights to continue from; "package" is the package's own folder, None starts from random weights.
    """

    def __init__(self, styles: list[CaptionStyle], reading: float = 1.0, start: str | None = None) -> None:
        super().__init__()
        self.styles, self.reading, self.start = styles, reading, start

    def build(self) -> None:
        """A captioner, fresh or trained."""
        if self.start is None:
            model = create_captioner()
        else:
            model = load_captioner((WEIGHTS if self.start == "package" else Path(self.start)) / "captioner")
        captioner = HFCaptioner(model, processor(), INSTRUCTION)
        self.policy = captioner.learner.network
        self.reader = nn.Linear(self.policy.base.config.text_config.hidden_size, KINDS)
        self.frozen = (captioner,)

    def caption(self, scene: Scene) -> str:
        """One caption from the mixture."""
        style = self.rng.choices(self.styles, weights=[style.share for style in self.styles])[0]
        return describe(scene, style.detail, self.rng)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``caption``: nats per token; ``reading``: nats per cell; ``loss``: both."""
        (captioner,) = self.frozen
        context = captioner.prepare(batch["image"])
        tokens_NT, mask_NT = self._tokens([self.caption(scene) for scene in batch["scene"]])
        logp_NT = self.policy(context, tokens_NT, 1, 1.0, (mask_NT != 0).sum(1))
        caption = -logp_NT.masked_fill(mask_NT == 0, 0.0).sum() / mask_NT.sum()  # padding is banned: -inf
        seen = self.policy.base.model.get_image_features(
            torch.cat(context.patches), context.rows["image_grid_thw"], return_dict=True
        ).pooler_output
        cells = cell_codes(batch["scene"]).to(tokens_NT.device)
        reading = F.cross_entropy(self.reader(torch.cat(list(seen))), cells.flatten())
        return {"loss": caption + self.reading * reading, "caption": caption.detach(), "reading": reading.detach()}

    def _tokens(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        (captioner,) = self.frozen
        tokenizer = captioner.processor.tokenizer
        batch = tokenizer([f"{c} {tokenizer.eos_token}" for c in captions], padding=True, padding_side="right", return_tensors="pt")
        return batch["input_ids"].to(captioner.device), batch["attention_mask"].to(captioner.device)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """Samples at temperature 1: share of valid captions, mean words, precision of what they claim."""
        (captioner,) = self.frozen
        rollout = captioner.sample(captioner.prepare(batch["image"]), 1, Sampling(max_tokens=32), batch["id"].tolist())
        said = [parse(text) for text in rollout.texts]
        claims = [
            any((o.color, o.shape) == (t.color, t.shape) for t in scene.objects)
            for caption, scene in zip(said, batch["scene"], strict=True)
            for o in (caption.objects if caption else ())
        ]
        return {
            "valid": sum(caption is not None for caption in said) / len(said),
            "words": sum(len(text.split()) for text in rollout.texts) / len(said),
            "precision": sum(claims) / max(len(claims), 1),
        }

    def save(self, folder: Path) -> None:
        """Write ``captioner/``."""
        (captioner,) = self.frozen
        self.policy.base.cpu().save_pretrained(folder / "captioner")
        captioner.processor.save_pretrained(folder / "captioner")
