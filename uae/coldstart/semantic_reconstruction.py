"""The semantic reconstruction loss: a frozen image encoder compares images with what is drawn from their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from uae.coldstart.system_objective import (
    SystemObjective,
    captions_of,
    diffusers_renderer,
    hf_captioner,
    recompute,
    save_captioner,
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
    """Minimises ``1 - cos(f(x), f(x~))`` (arXiv 2509.09666, cold start): x is an image, x~ is drawn from its caption.

    The gradient goes back through the denoising steps to the conditioner. The noise is computed from the image's id and
    the step. At the end the objective writes ``conditioner.safetensors``, and ``captioner/`` if the language model trained.

    Args:
        encoder: The image encoder f. None takes the encoder of the first `uae.rewards.EncoderSimilarity` in the run's reward.
        last_steps: Number of denoising steps, counted from the last, that the gradient goes through; None is all of them.
        trainable: Regular expression; parameters of the conditioner whose names it matches train.
        language_model: Whether the captioner trains too, as the run's ``finetune`` says. It must be the language model
            that reads captions for the conditioner.
        gradient_checkpointing: Whether activations inside the denoiser's layers are recomputed in the backward pass
            instead of kept in memory.
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
        """Make weights of the conditioner trainable, and those of the language model if it trains.

        Raises:
            ValueError: The system cannot be trained so, or there is no encoder.
        """
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
                "nor model.init_args.reward names one; set model.init_args.objective.init_args.encoder"
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
                f"{key}=true, but the conditioner reads captions with a language model of its own, not with the captioner's; "
                f"set {key} to false"
            )
        if umm.needs_reference:
            raise ValueError(
                f"{key}=true, but model.init_args.system.init_args.condition_weights=start: captions are read with a frozen "
                "copy; set model.init_args.system.init_args.condition_weights to live"
            )
        if self.finetune is None:
            raise ValueError(
                f"{key}=true, but model.init_args.finetune=null; allowed: uae.models.finetune.LoRA or uae.models.finetune.Full; "
                "set model.init_args.finetune"
            )
        captioner = hf_captioner(umm, "SemanticReconstruction")
        self.finetune.attach(captioner.learner, keep_reference=False)
        self.policy, self.processor = captioner.learner.network, captioner.processor

    def place(self, device: torch.device) -> None:
        """Move the frozen parts, and the image encoder, to a device."""
        super().place(device)
        assert self.encoder is not None
        self.encoder.load(device)

    def forward(self, batch: ImageBatch, progress: float) -> dict[str, Tensor]:
        """``loss``: one minus the cosine similarity, averaged over the batch, from 0 to 2."""
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
        """``cosine``: mean similarity of held-out images and the images drawn from their captions.

        Every validation starts from the same noise.
        """
        return {"cosine": self._cosine(batch, step=-1).mean().item()}

    def save(self, folder: Path) -> None:
        """Write ``conditioner.safetensors`` below ``folder``, and ``captioner/`` if the language model trained."""
        save_trained(folder, self.conditioner)
        if self.language_model:
            save_captioner(folder, self.policy, self.processor)
