"""UAE, the paper's own UMM-1: Qwen2.5-VL-3B, an MLP projector and Stable Diffusion 3.5 Large.

The language model that wrote the caption reads it again, as the content of a message of role ``generate``. Its final hidden
states go through the projector and replace the output of all text encoders of Stable Diffusion.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from uae.files.locations import here, local_folder
from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.blueprints import Blueprint
from uae.types import UMM
from uae.weights.remote_code import refused

INSTRUCTION = (
    "You are an expert in describing images. Write a description of this image so complete that it can be drawn again from "
    "your words alone: objects with their attributes, counts, places and relations, background, light, viewpoint and style. "
    'Put any text in the image between "double quotes", word for word.'
)
NEGATIVE = "Generate a random, low quality, ugly, blur, bad and anime, cartoon image."  # from the official inference code
KEY = "model.init_args.system.init_args.checkpoint"
PUBLISHED_LLM, PUBLISHED_SD3 = "Qwen/Qwen2.5-VL-3B-Instruct", "stabilityai/stable-diffusion-3.5-large"  # of UAE's sizes


class UAE:
    """A `uae.types.System` of the official checkpoint folder.

    Subfolders: ``llm`` (Qwen2.5-VL with ``projector.*``), ``llm_lora`` (shards of the trained language model; optional),
    ``llm_model_preprocessor`` (optional), ``dit`` and ``dit_lora`` (the transformer and its adapter; optional),
    ``SD3_model`` (autoencoder, scheduler, CLIP text encoders, and the transformer if there is no ``dit``).

    Args:
        checkpoint: The folder, or the hub id of such a folder.
        condition_on: Source of the renderer's condition. "text": the caption is read again without the image.
            "answer_states": the hidden states of the caption's tokens in the sequence of image, question and caption, as in
            the official cold start. These states attend to the image, so content that the caption does not mention can
            reach the renderer. This leak makes "answer_states" suitable for comparisons and ablations only.
        condition_weights: Weights that read the captions for the renderer. "live": those in training, as in the official
            code. "start": those the run started from, so that the renderer's reading does not change during training.
        condition_tokens: Most tokens of a caption and its template that are read; longer captions are cut.
        negative_prompt: Prompt from which classifier-free guidance moves away.
        reading: Settings with which the captioner is loaded and prompted.
        rendering: Size, steps, guidance and memory settings of the renderer.
    """

    def __init__(
        self,
        checkpoint: str = "UAE",
        condition_on: Literal["text", "answer_states"] = "text",
        condition_weights: Literal["live", "start"] = "live",
        condition_tokens: int = 1024,
        negative_prompt: str = NEGATIVE,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        rendering: Rendering = Rendering(steps=10, guidance=5.0),  # noqa: B008
    ) -> None:
        self.checkpoint, self.negative_prompt = checkpoint, negative_prompt
        self.condition_on, self.condition_weights = condition_on, condition_weights
        self.condition_tokens, self.reading, self.rendering = condition_tokens, reading, rendering

    def blueprint(self) -> Blueprint:
        """The networks of the system without weights: of the checkpoint if it is on this machine, else of the published sizes."""
        from uae.models.conditioners.states import mlp_projector
        from uae.systems.blueprints import denoiser_skeleton, vae_skeleton, vlm_skeleton
        from uae.weights.from_state import qwen_model

        folder = here(self.checkpoint)
        dtype = self.reading.dtype
        policy = qwen_model(folder / "llm", getattr(torch, dtype)) if folder else vlm_skeleton(PUBLISHED_LLM, dtype)
        sd3 = str(folder / "SD3_model") if folder else PUBLISHED_SD3
        transformer = denoiser_skeleton(sd3)
        width, width_out = policy.config.get_text_config().hidden_size, transformer.config.joint_attention_dim
        with torch.device("meta"):
            projector = mlp_projector(width, 2 * width_out, width_out).bfloat16()
        frozen = {"projector": projector, "transformer": transformer, "vae": vae_skeleton(sd3)}
        return Blueprint(
            policy,
            {name: (module, self.rendering.placement) for name, module in frozen.items()},
            self.rendering,
            condition_tokens=self.condition_tokens,
            reading=self.reading,
            policy_reads=True,
            needs_reference=self.condition_weights == "start",
        )

    def build(self) -> UMM:
        """Load the parts on the CPU. Neither T5 nor the CLIP text encoders stay in memory."""
        from transformers import AutoProcessor

        from uae.models.captioners.loading import assemble_captioner, with_engine
        from uae.models.conditioners.projector import load_projector
        from uae.models.renderers.diffusers import DiffusersRenderer
        from uae.systems.layouts import uae_language_model

        folder = local_folder(self.checkpoint, KEY)
        check_folders(folder)
        model, projector = uae_language_model(folder, getattr(torch, self.reading.dtype), attention=self.reading.attention)
        preprocessor = folder / "llm_model_preprocessor"
        preprocessor = preprocessor if preprocessor.is_dir() else folder / "llm"
        with refused(self.checkpoint):
            processor = AutoProcessor.from_pretrained(preprocessor, local_files_only=True, trust_remote_code=False)
        captioner = assemble_captioner(model, processor, self.reading, INSTRUCTION, image_first=False)
        conditioner, unconditional = self._conditioners(
            captioner, load_projector(projector, model.config.get_text_config().hidden_size, KEY), folder
        )

        @torch.no_grad()
        def negative() -> Any:
            return unconditional.encode([self.negative_prompt])

        frozen = self.condition_weights == "start"
        renderer = DiffusersRenderer(self._pipeline(folder), self.rendering, cache(negative) if frozen else negative)
        return UMM(with_engine(captioner, self.reading), conditioner, renderer, needs_reference=frozen)

    def _conditioners(self, captioner: Any, projector: nn.Module, folder: Path) -> tuple[Any, Any]:
        """The conditioner of captions and the conditioner of the negative prompt."""
        from uae.models.conditioners.answer_states import AnswerStateConditioner
        from uae.models.conditioners.prompts import chat_template
        from uae.models.conditioners.states import HiddenStateConditioner
        from uae.models.conditioners.text_encoders import empty_pooled

        pooled_P = empty_pooled(folder / "SD3_model", ("", "_2"), projected=True)
        reads = HiddenStateConditioner(
            lambda: captioner.language_model,
            captioner.processor.tokenizer,
            projector,
            template=chat_template(captioner.processor, role="generate"),
            max_tokens=self.condition_tokens,
            pooled=pooled_P,
            weights=captioner.learner.reference if self.condition_weights == "start" else nullcontext,
        )
        if self.condition_on == "text":
            return reads, reads
        return AnswerStateConditioner(captioner, projector, pooled_P, self.condition_tokens), reads

    def _pipeline(self, folder: Path) -> Any:
        """The Stable Diffusion 3 pipeline with the trained transformer and without text encoders."""
        from uae.models.pipelines.loading import load_pipeline
        from uae.systems.layouts import uae_transformer
        from uae.weights.placement import torch_dtype

        placement = self.rendering.placement
        trained = {"transformer": uae_transformer(folder, torch_dtype(placement))} if (folder / "dit").is_dir() else {}
        absent = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
        return load_pipeline(str(folder / "SD3_model"), placement, KEY, **absent, **trained)


def check_folders(folder: Path) -> None:
    """Check that the required subfolders exist.

    Raises:
        FileNotFoundError: A required subfolder is missing.
    """
    missing = [name for name in ("llm", "SD3_model") if not (folder / name).is_dir()]
    if missing:
        found = sorted(child.name for child in folder.iterdir() if child.is_dir())
        raise FileNotFoundError(
            f"UAE checkpoint {str(folder)!r} lacks {', '.join(missing)} (it has {', '.join(found) or 'no folder'}); "
            f"{KEY} must be a folder with llm and SD3_model, and dit, dit_lora, llm_lora, llm_model_preprocessor if trained"
        )
