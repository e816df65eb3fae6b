"""The semantic reconstruction loss: images drawn from captions look like their sources, to a frozen encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.coldstart.system_objective import (
    CAPTIONER,
    SystemObjective,
    captions_of,
    diffusers_renderer,
    hf_captioner,
    recompute,
    save_network,
    save_trained,
    unfreeze,
)
from uae.encoders import similarity
from uae.models.conditioners.answer_states import AnswerStateConditioner
from uae.models.conditioners.states import LanguageReader
from uae.rewards import EncoderSimilarity
from uae.seeds import seed_of
from uae.types import UMM, ImageBatch, ImageEncoder


class SemanticReconstruction(SystemObjective):
    """``1 - cos(f(x), f(x~))`` through the whole sampler to the conditioner (arXiv 2509.09666, cold start).

    Noise follows from the image's id and the step. Written at the end: ``conditioner.safetensors``, and ``captioner/`` if
    the language model trains.

    Args:
        encoder: f. None is that of the run's reward, the first `uae.rewards.EncoderSimilarity` in it.
        last_steps: Denoising steps that the gradient goes back through, counted from the end; None is all of them.
        trainable: Regular expression over the conditioner's parameter names: what of it trains.
        language_model: Also train the captioner that reads captions for the conditioner, as the run's ``finetune`` says.
        gradient_checkpointing: Compute the insides of the denoiser's layers again in the backward pass.
    """

    def __init__(
        self,
        encoder: ImageEncoder | None = None,
        last_steps: int | None = None,
        trainable: str = "projector|connector|meta_queries",
        language_model: bool = False,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if last_steps is not None and last_steps < 1:
            raise ValueError(f"model.init_args.objective.init_args.last_steps={last_steps}; allowed: null or 1 or more")
        self.encoder, self.last_steps, self.trainable = encoder, last_steps, trainable
        self.language_model, self.gradient_checkpointing = language_model, gradient_checkpointing

    def attach(self, umm: UMM) -> None:
        """The conditioner's trainables, and the language model's."""
        self.renderer = diffusers_renderer(umm, "SemanticReconstruction")
        self.conditioner = unfreeze(umm.conditioner, self.trainable, "SemanticReconstruction")
        if self.language_model:
            self._attach_language_model(umm)
        if self.encoder is None:
            parts = self.reward.parts.values() if self.reward is not None else ()
            self.encoder = next((part.encoder for part in parts if isinstance(part, EncoderSimilarity)), None)
        if self.encoder is None:
            raise ValueError(
                "SemanticReconstruction compares images by an encoder, and neither model.init_args.objective.init_args.encoder "
                "nor model.init_args.reward names one: set the encoder"
            )
        self.encoder.load()
        if self.gradient_checkpointing:
            recompute(self.renderer)

    def _attach_language_model(self, umm: UMM) -> None:
        key = "model.init_args.objective.init_args.language_model"
        readers = [part for part in self.conditioner.modules() if isinstance(part, LanguageReader)]
        borrowed = any(reader.language_model is None for reader in readers) or isinstance(self.conditioner, AnswerStateConditioner)
        if not borrowed:
            raise ValueError(
                f"{key}=true, but captions are read by a language model of the conditioner's own: set it to false"
            )
        if umm.needs_reference:
            raise ValueError(
                f"{key}=true, but captions are read with the starting weights: set condition_weights to live"
            )
        if self.finetune is None:
            raise ValueError(f"{key}=true, and model.init_args.finetune is null: set it")
        captioner = hf_captioner(umm, "SemanticReconstruction")
        self.finetune.attach(captioner.learner, keep_reference=False)
        self.policy, self.processor = captioner.learner.network, captioner.processor

    def place(self, device: torch.device) -> None:
        """Move the parts that Lightning does not know of, the encoder too."""
        super().place(device)
        assert self.encoder is not None
        self.encoder.load(device)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: one minus the cosine, the mean over the batch."""
        return {"loss": 1 - self._cosine(batch, self.step).mean()}

    def _cosine(self, batch: ImageBatch, step: int) -> Tensor:
        assert self.encoder is not None
        condition: Any = self.condition(batch, captions_of(batch, self))
        seeds = [seed_of(self.seed, image, step) for image in batch["id"].tolist()]
        grad = torch.is_grad_enabled()
        drawn_BCHW = self.renderer.render(condition, seeds, grad=grad, last=self.last_steps)
        with torch.no_grad():
            source_BD = self.encoder.embed(batch["image"])
        return similarity(source_BD, self.encoder.embed(drawn_BCHW))

    @torch.no_grad()
    def score(self, batch: ImageBatch) -> dict[str, float]:
        """``cosine`` of held-out images and what their captions draw, from the same noise every time."""
        return {"cosine": self._cosine(batch, step=-1).mean().item()}

    def save(self, folder: Path) -> None:
        """Write ``conditioner.safetensors`` and ``captioner/``."""
        save_trained(folder, self.conditioner)
        if self.language_model:
            save_network(folder / CAPTIONER, self.policy.model)
            if not self.policy.adapted:
                self.processor.save_pretrained(folder / CAPTIONER)
