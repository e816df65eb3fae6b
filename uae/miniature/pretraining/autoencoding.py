"""Training of the miniature's autoencoder: reconstruct scenes from noised latents."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from uae.coldstart.objective import Objective
from uae.miniature.metrics.scenes import agreement
from uae.miniature.scenes import detect, render, sample_scene
from uae.miniature.scenes.world import CELL, GRID
from uae.miniature.tiny import WEIGHTS, load_autoencoder
from uae.types import ImageBatch


class AutoencoderObjective(Objective):
    """Weighted squared error after noise on the latent.

    Objects are weighted by the inverse of their area, so that a tiny ring's hole counts as much as a large square.
    Half of the images are crowded (up to nine objects): every cell then teaches something.

    Args:
        width: Channels of the autoencoder.
        noise: Largest standard deviation of the latent noise, in units of the latent's own deviation.
        sharpen: Folder of a trained autoencoder whose decoding half alone goes on learning; its latents stay what they
            are, so a diffusion model trained on them still fits. "package" is the package's own.
    """

    def __init__(self, width: int = 96, noise: float = 0.5, sharpen: str | None = None) -> None:
        super().__init__()
        self.width, self.noise, self.sharpen = width, noise, sharpen

    def build(self) -> None:
        """A fresh autoencoder, or a trained one whose encoding half is frozen."""
        from uae.miniature.patch_autoencoder import PatchAutoencoder

        if self.sharpen is None:
            self.vae = PatchAutoencoder.create(width=self.width)
            return
        folder = WEIGHTS / "decoder" / "vae" if self.sharpen == "package" else Path(self.sharpen)
        self.vae = load_autoencoder(folder)
        self.vae.encoder.requires_grad_(False)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: weighted mean squared error in [0, 1] pixel units."""
        crowded = render([sample_scene(self.rng, (5, 7, 9)) for _ in range(len(batch["image"]))])
        images = torch.cat([batch["image"], crowded.to(batch["image"])])
        latents = self.vae.encode(images * 2 - 1).latents
        standard = self._standard(latents)
        strength = torch.rand(len(images), 1, 1, 1, device=images.device) * self.noise
        decoded = (self.vae.decode(standard + strength * torch.randn_like(standard)).sample + 1) / 2
        return {"loss": (inverse_area(images) * (decoded - images).square()).mean() + 1e-3 * latents.square().mean()}

    def _standard(self, latents: Tensor) -> Tensor:
        """Latents of unit variance per channel; saved ones have it already."""
        if self.sharpen is not None:
            return latents
        return (latents - latents.mean((0, 2, 3), keepdim=True)) / (latents.std((0, 2, 3), keepdim=True) + 1e-4)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """Share of scenes the exact detector still reads right after encoding and decoding."""
        standard = self._standard(self.vae.encode(batch["image"] * 2 - 1).latents)
        scores = {}
        for name, noise in (("whole", 0.0), ("whole_noise_0.3", 0.3)):
            decoded = (self.vae.decode(standard + noise * torch.randn_like(standard)).sample + 1) / 2
            scores[name] = agreement(detect(decoded.clamp(0, 1)), batch["scene"])["whole"]
        return scores

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Standardise the latents on fresh scenes (once), then write ``decoder/vae``."""
        self.vae.cpu()
        if self.sharpen is None:
            images = render([sample_scene(self.rng) for _ in range(4096)])
            self.vae.standardize(self.vae.encode(images * 2 - 1).latents)
        self.vae.half().save_pretrained(folder / "decoder" / "vae")  # half the size; read back as float32


def inverse_area(images_NCHW: Tensor) -> Tensor:
    """Pixel weights ``[N, 1, H, W]``: 1, plus 40 shared among the pixels of each object's box (the hole of a ring counts).

    The corner of a cell is always background.
    """
    cells = images_NCHW.unflatten(2, (GRID, CELL)).unflatten(4, (GRID, CELL))  # [N, 3, 3, 8, 3, 8]
    ink = ((cells - cells[:, :, :, -1:, :, -1:]).abs().sum(1, keepdim=True) > 1e-3).float()
    box = ink.amax(3, keepdim=True) * ink.amax(5, keepdim=True)
    weights = 1 + 40 * box / box.sum((3, 5), keepdim=True).clamp(min=1)
    return weights.flatten(4, 5).flatten(2, 3)
