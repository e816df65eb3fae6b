"""Contrastive training of the miniature's CLIP, with one-attribute edits as hard negatives."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uae.coldstart.objective import Objective
from uae.miniature.scenes import WORDS, Scene, describe, render
from uae.miniature.scenes.world import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES
from uae.types import ImageBatch

IDS = {word: i + 1 for i, word in enumerate(WORDS)}  # 0 pads; the highest id ends, as open_clip's pooling expects
END = len(WORDS) + 1
CONTEXT = 40
MEAN = STD = (0.5, 0.5, 0.5)


class ContrastiveObjective(Objective):
    """CLIP's symmetric cross-entropy over scenes and their edits.

    Every scene comes with copies that differ in one attribute. Without them a CLIP learns to retrieve and stays blind
    to shapes and sizes, and what the encoder cannot see earns no reward.

    Args:
        edits: Edited copies per scene.
        largest_scale: Upper bound of the learned logit scale. A small one forces edits apart in angle.
    """

    def __init__(self, edits: int = 3, largest_scale: float = 15.0) -> None:
        super().__init__()
        self.edits, self.largest_scale = edits, largest_scale

    def build(self) -> None:
        """A fresh open_clip model."""
        from open_clip import CLIP

        self.clip = CLIP(**clip_config())

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: mean of both directions, nats."""
        scenes = [copy for scene in batch["scene"] for copy in (scene, *(edit(scene, self.rng) for _ in range(self.edits)))]
        image_ND = self.clip.encode_image(normalized(render(scenes).to(batch["image"])), normalize=True)
        text_ND = self.clip.encode_text(encode([describe(scene) for scene in scenes]).to(image_ND.device), normalize=True)
        logits_NN = self.clip.logit_scale.exp().clamp(max=self.largest_scale) * image_ND @ text_ND.T
        truth = torch.arange(len(scenes), device=image_ND.device)
        loss = (F.cross_entropy(logits_NN, truth) + F.cross_entropy(logits_NN.T, truth)) / 2
        return {"loss": loss, "scale": self.clip.logit_scale.exp().detach()}

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """Cosine of scenes with their edits per attribute, and with other scenes; retrieval of the caption."""
        rng = random.Random(0)
        image_ND = self._embed(batch["scene"])
        text_ND = self.clip.encode_text(encode([describe(scene) for scene in batch["scene"]]).to(image_ND.device), normalize=True)
        hits = (image_ND @ text_ND.T).argmax(1).cpu() == torch.arange(len(image_ND))
        scores = {
            "retrieval": hits.float().mean().item(),
            "other": (image_ND * image_ND.roll(1, 0)).sum(1).mean().item(),
        }
        for attribute in ("color", "shape", "size", "place", "background"):
            edited_ND = self._embed([edit(scene, rng, attribute) for scene in batch["scene"]])
            scores[f"edit_{attribute}"] = (image_ND * edited_ND).sum(1).mean().item()
        return scores

    def _embed(self, scenes: list[Scene]) -> Tensor:
        device = self.clip.logit_scale.device
        return self.clip.encode_image(normalized(render(scenes).to(device)), normalize=True)

    def save(self, folder: Path) -> None:
        """Write ``clip/`` as an open_clip ``local-dir`` checkpoint."""
        from safetensors.torch import save_file

        out = folder / "clip"
        out.mkdir(parents=True, exist_ok=True)
        preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
        config = {"model_cfg": clip_config(), "preprocess_cfg": preprocess}
        (out / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in self.clip.state_dict().items()},
            out / "open_clip_model.safetensors",
        )


def clip_config() -> dict[str, Any]:
    """The miniature's CLIP, in open_clip's terms."""
    vision = {"image_size": 24, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8}
    text = {"context_length": CONTEXT, "vocab_size": END + 1, "width": 96, "heads": 3, "layers": 2}
    return {"embed_dim": 128, "vision_cfg": vision, "text_cfg": text}


def normalized(images_NCHW: Tensor) -> Tensor:
    """[0, 1] to the CLIP's input range."""
    return (images_NCHW - MEAN[0]) / STD[0]


def encode(captions: list[str]) -> Tensor:
    """Captions to ids ``[N, 40]``."""
    rows = [[IDS[word] for word in caption.split()] + [END] for caption in captions]
    return torch.tensor([row + [0] * (CONTEXT - len(row)) for row in rows])


def edit(scene: Scene, rng: random.Random, attribute: str | None = None) -> Scene:
    """A copy of a scene that differs in one attribute: color, shape, size, place or background."""
    attribute = attribute or rng.choice(("color", "shape", "size", "place", "background"))
    if attribute == "background":
        return replace(scene, background=rng.choice([name for name in BACKGROUNDS if name != scene.background]))
    at = rng.randrange(len(scene.objects))
    obj = scene.objects[at]
    if attribute == "place":
        taken = {(other.row, other.column) for other in scene.objects}
        row, column = rng.choice([(r, c) for r in ROWS for c in COLUMNS if (r, c) not in taken])
        changed = replace(obj, row=row, column=column)
    else:
        values = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES)}[attribute]
        changed = replace(obj, **{attribute: rng.choice([v for v in values if v != getattr(obj, attribute)])})
    objects = [*scene.objects[:at], changed, *scene.objects[at + 1 :]]
    objects.sort(key=lambda o: (ROWS.index(o.row or ""), COLUMNS.index(o.column or "")))
    return Scene(scene.background, tuple(objects))
