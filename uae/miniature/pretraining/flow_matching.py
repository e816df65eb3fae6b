"""Training of a diffusion decoder on captions: flow matching with logit-normal times."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import Tensor

from uae.coldstart.objective import Objective
from uae.coldstart.velocity import velocity_of
from uae.miniature.metrics.scenes import agreement
from uae.miniature.scenes import Detail, Scene, describe, detect, render
from uae.miniature.tiny import WEIGHTS, create_decoder, load_autoencoder, load_decoder, save_decoder
from uae.models.conditioners.states import EmbeddingCondition
from uae.types import ImageBatch


class FlowMatchingObjective(Objective):
    """Velocity regression: predict ``noise - latent`` at ``x_t = (1 - t) latent + t noise``.

    Captions of every level of detail are drawn, so that what a caption leaves unsaid is drawn from the noise. The
    number of objects grows over the first half of the training.

    Args:
        width: Width of the transformer.
        layers: Number of layers of the transformer.
        draws: Number of noise samples per caption; they share one pass of the text encoder.
        dropout: Share of captions replaced by the empty string, which classifier-free guidance needs.
        detailed: Share of detailed captions; the rest is split between terse ones and ones that leave out some attributes.
        error: Chance, per said attribute of an object, that the caption states a random value. Captions that are wrong at times
            leave something for the reward to teach the decoder.
        start: Folder of weights to continue from, with all objects from the first step; "package" is the package's own
            folder, None starts from random weights.
    """

    def __init__(
        self,
        width: int = 128,
        layers: int = 5,
        draws: int = 2,
        dropout: float = 0.05,
        detailed: float = 0.5,
        error: float = 0.0,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.width, self.layers, self.draws = width, layers, draws
        self.dropout, self.detailed, self.error, self.start = dropout, detailed, error, start

    def build(self) -> None:
        """Transformer and conditioner, fresh or trained, around the trained autoencoder."""
        if self.start is not None:
            folder = WEIGHTS if self.start == "package" else Path(self.start)
            conditioner, renderer = load_decoder(folder / "decoder", steps=8, guidance=1.0)
        else:
            conditioner, renderer = create_decoder(self.width, self.layers)
            renderer.pipe.register_modules(vae=load_autoencoder(WEIGHTS / "decoder" / "vae"))
        renderer.pipe.vae.requires_grad_(False).eval()
        self.conditioner = conditioner.requires_grad_(True)
        self.transformer = renderer.pipe.transformer.requires_grad_(True)
        self.frozen = (renderer,)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: mean squared error of the velocity, latent units."""
        (renderer,) = self.frozen
        most = 3 if self.start is not None or progress >= 0.3 else 2 if progress >= 0.12 else 1
        scenes = [self._simplified(scene, most) for scene in batch["scene"]]
        device = batch["image"].device
        with torch.no_grad():
            renderer.pipe.vae.to(device)
            latents = renderer.pipe.vae.encode(render(scenes).to(device) * 2 - 1).latents.repeat(self.draws, 1, 1, 1)
        once = self.conditioner.encode([self.caption(scene) for scene in scenes])
        condition = once.index(list(range(len(once))) * self.draws)
        time = torch.sigmoid(0.7 + 1.2 * torch.randn(len(latents), device=device))
        noise = torch.randn_like(latents)
        noised = torch.lerp(latents, noise, time[:, None, None, None])
        return {"loss": (self.velocity(noised, time, condition) - (noise - latents)).square().mean()}

    def velocity(self, noised: Tensor, time: Tensor, condition: EmbeddingCondition) -> Tensor:
        """The transformer's prediction; ``time`` in [0, 1]."""
        (renderer,) = self.frozen
        return velocity_of(renderer, noised, time, condition)

    def _simplified(self, scene: Scene, most: int) -> Scene:
        objects = self.rng.sample(scene.objects, min(most, len(scene.objects)))
        return Scene(scene.background, tuple(sorted(objects, key=scene.objects.index)))

    def caption(self, scene: Scene) -> str:
        """A caption of random detail. Tiny objects are left out only of captions that say nothing but color and shape."""
        chance = self.rng.random()
        if chance < self.dropout:
            return ""
        shuffle = self.rng.random() < 0.3
        if chance < self.dropout + self.detailed:
            return describe(scene, Detail(error=self.error, shuffle=shuffle), self.rng)
        return describe(scene, some_detail(self.rng, shuffle, self.error), self.rng)

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """The detector's scores on detailed ground-truth captions."""
        (renderer,) = self.frozen
        training = self.transformer.training
        self.transformer.eval()
        condition = self.conditioner.encode([describe(scene) for scene in batch["scene"]])
        images = renderer.render(condition, batch["id"].tolist())
        self.transformer.train(training)
        return agreement(detect(images), batch["scene"])

    def save(self, folder: Path) -> None:
        """Write ``decoder/``, but for the autoencoder."""
        save_decoder(folder / "decoder", self.conditioner.cpu(), self.transformer.cpu())


def some_detail(rng: random.Random, shuffle: bool, error: float = 0.0) -> Detail:
    """Any of size, place and background. Tiny objects are left out only where nothing but color and shape is said."""
    size, position, background = (rng.random() < 0.5 for _ in range(3))
    omit = 0.0 if size or position or background else 0.85
    return Detail(size, position, background, omit_tiny=omit, error=error, shuffle=shuffle)
