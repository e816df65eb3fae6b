"""Training of the held-out judge: one vector that knows every attribute of a scene."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uae.coldstart.objective import Objective
from uae.miniature.scenes import SIDE
from uae.miniature.scenes.world import BACKGROUNDS, CELL, GRID, KINDS, cell_codes
from uae.types import ImageBatch


class AttributeObjective(Objective):
    """Cross-entropy of what every cell holds and of the background, read from the class token by a linear head.

    Every patch token reads its own cell as well, which teaches the lower layers. A small term keeps the vectors of
    different scenes apart, so that the cosine has a low floor. The heads are thrown away. Nothing here sees a caption or
    another encoder.

    Args:
        width: Width of the DINOv2 model.
        layers: Number of layers of the DINOv2 model.
        noise: Largest standard deviation of pixel noise, so that the judge does not depend on exact colors.
    """

    def __init__(self, width: int = 96, layers: int = 3, noise: float = 0.1) -> None:
        super().__init__()
        self.width, self.layers, self.noise = width, layers, noise

    def build(self) -> None:
        """A fresh DINOv2 model."""
        from transformers import Dinov2Config, Dinov2Model

        config = Dinov2Config(
            hidden_size=self.width, num_hidden_layers=self.layers, num_attention_heads=4, image_size=SIDE, patch_size=CELL,
            layerscale_value=1.0,
        )  # fmt: skip
        self.model = Dinov2Model(config)
        # With small position embeddings, positions take long to learn.
        nn.init.normal_(self.model.embeddings.position_embeddings, std=0.5)
        self.head = nn.Linear(self.width, GRID * GRID * KINDS + len(BACKGROUNDS))
        self.patch_head = nn.Linear(self.width, KINDS)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: nats per cell plus nats per background."""
        images = batch["image"] + self.noise * torch.rand(1, device=batch["image"].device) * torch.randn_like(batch["image"])
        tokens_NTD = self._tokens(images)
        cells, backgrounds = self._read(tokens_NTD[:, 0])
        codes, truth = self._truth(batch)
        unit_ND = F.normalize(tokens_NTD[:, 0], dim=1)
        alike = (unit_ND @ unit_ND.T).square().mean()
        loss = balanced(cells, codes) + balanced(self.patch_head(tokens_NTD[:, 1:]), codes) + F.cross_entropy(backgrounds, truth)
        return {"loss": loss + alike, "alike": alike.detach()}

    def _tokens(self, images_NCHW: Tensor) -> Tensor:
        """The class token and one token per cell, ``[N, 10, D]``."""
        return self.model(pixel_values=(images_NCHW - 0.5) / 0.5).last_hidden_state

    def _read(self, vector_ND: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of cells ``[N, 9, kinds]`` and of the background ``[N, 4]``."""
        logits = self.head(vector_ND)
        cells, backgrounds = logits.split([GRID * GRID * KINDS, len(BACKGROUNDS)], dim=1)
        return cells.unflatten(1, (GRID * GRID, KINDS)), backgrounds

    def _truth(self, batch: ImageBatch) -> tuple[Tensor, Tensor]:
        device = batch["image"].device
        backgrounds = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in batch["scene"]], device=device)
        return cell_codes(batch["scene"]).to(device), backgrounds

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """Accuracy on occupied cells; share of scenes read entirely right; cosine between different scenes."""
        vector_ND = self._tokens(batch["image"])[:, 0]
        cells, backgrounds = self._read(vector_ND)
        codes, truth = self._truth(batch)
        right = cells.argmax(-1) == codes
        unit_ND = F.normalize(vector_ND, dim=1)
        return {
            "objects": right[codes > 0].float().mean().item(),
            "whole": (right.all(1) & (backgrounds.argmax(-1) == truth)).float().mean().item(),
            "other": (unit_ND * unit_ND.roll(1, 0)).sum(1).mean().item(),
        }

    def save(self, folder: Path) -> None:
        """Write ``judge/`` as a transformers folder with its preprocessing."""
        from transformers import BitImageProcessor

        self.model.cpu().save_pretrained(folder / "judge")
        size = {"height": SIDE, "width": SIDE}
        BitImageProcessor(size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3).save_pretrained(
            folder / "judge"
        )


def balanced(logits_NCK: Tensor, codes_NC: Tensor) -> Tensor:
    """Cross-entropy of occupied and of empty cells in equal parts: most cells are empty and teach nothing."""
    occupied = codes_NC > 0
    parts = (F.cross_entropy(logits_NCK[mask], codes_NC[mask]) for mask in (occupied, ~occupied))
    return sum(parts, torch.zeros((), device=logits_NCK.device)) / 2
