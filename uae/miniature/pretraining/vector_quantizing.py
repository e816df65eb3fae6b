"""Training of a tiny Janus's autoencoder: every cell of a scene is one code, known beforehand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from uae.coldstart.objective import Objective
from uae.miniature.metrics.scenes import agreement
from uae.miniature.pretraining.autoencoding import inverse_area
from uae.miniature.scenes import detect, render, sample_scene
from uae.miniature.tiny_janus import create, save, scene_codes
from uae.types import ImageBatch


class VectorQuantizingObjective(Objective):
    """The decoder draws the true codes; the encoder finds them.

    The ground truth says which code a cell is, so codes need not be discovered: squared error of what the decoder makes
    of the true codes, weighted by the inverse of an object's area, plus cross-entropy over the distances between the
    encoder's output and the codebook. Half of the images are crowded (up to nine objects): every cell then teaches something.

    The decoder of transformers' Janus reads codes normalised to length 1, but its ``encode`` compares them as they are; the
    original compares directions (LlamaGen's ``l2_norm``). Where lengths differ, such tokens decode to another image: of a
    checkpoint whose encoder was trained by directions, look codes up by directions. Here distances are as ``encode`` takes
    them, so what is trained is what is looked up, lengths stay near 1, and nothing learns from tokens that were looked up:
    those of a scene are known.

    Args:
        sharpness: Nats per unit of squared distance to the codebook (whose vectors are near length 1).
    """

    def __init__(self, sharpness: float = 10.0) -> None:
        super().__init__()
        self.sharpness = sharpness

    def build(self) -> None:
        """A fresh Janus, of which only the autoencoder is trained."""
        janus = create()
        self.model = janus.model.vqmodel
        self.frozen = (janus,)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``drawing``: weighted mean squared error, [0, 1] pixel units; ``coding``: nats per cell; ``loss``: both."""
        device = batch["image"].device
        scenes = [*batch["scene"], *(sample_scene(self.rng, (5, 7, 9)) for _ in batch["scene"])]
        images, codes_NC = render(scenes).to(device), scene_codes(scenes).to(device)
        drawing = (inverse_area(images) * (self._draw(codes_NC) - images).square()).mean()
        coding = F.cross_entropy(self._logits(images).flatten(0, 1), codes_NC.flatten())
        return {"loss": drawing + 0.1 * coding, "drawing": drawing.detach(), "coding": coding.detach()}

    def _draw(self, codes_NC: Tensor) -> Tensor:
        """Images ``[N, 3, 24, 24]`` around [0, 1]."""
        return self.model.decode(codes_NC) * 0.5 + 0.5

    def _logits(self, images_NCHW: Tensor) -> Tensor:
        """``[N, 9, codes]``: the quantiser takes the largest."""
        hidden_NDHW = self.model.quant_conv(self.model.encoder(images_NCHW * 2 - 1))
        distance = torch.cdist(hidden_NDHW.flatten(2).transpose(1, 2), self.model.quantize.embedding.weight)
        return -self.sharpness * distance.square()

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """Share of scenes the exact detector reads right from the true codes and from the encoder's; share of right codes."""
        truth_NC = scene_codes(batch["scene"])
        found_NC = self.model.encode(batch["image"] * 2 - 1).image_tokens.view(len(truth_NC), -1)
        scores = {"codes": (found_NC.cpu() == truth_NC).float().mean().item()}
        for name, codes_NC in (("whole_true_codes", truth_NC.to(found_NC.device)), ("whole", found_NC)):
            seen = detect(self._draw(codes_NC).clamp(0, 1))
            scores[name] = agreement(seen, batch["scene"])["whole"]
        return scores

    def save(self, folder: Path) -> None:
        """Write the whole Janus; its language model is as random as it was."""
        (janus,) = self.frozen
        save(folder, janus)
