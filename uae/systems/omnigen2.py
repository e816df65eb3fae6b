"""OmniGen2 as UMM-1: Qwen2.5-VL-3B and a diffusion transformer that draws from its states of the caption.

The language model reads the caption as a user's message, under OmniGen2's own system message. All its final hidden states, those of
the system message included, are the condition, without a projector.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any, Literal

import torch
from torch import nn

from uae.files.locations import local_folder
from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM

SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."  # officially also for reading
LEAD = "<img1>: "  # what the official code puts before an image that is read
DRAWS = "<|img|>"  # the token with which the released model asks to draw instead of answering


class OmniGen2:
    """A `uae.types.System` of one OmniGen2 checkpoint in the official layout.

    The captioner trains with ``model.init_args.train`` set to "captions", the transformer, with ``model.init_args.exploration``,
    with "images" or "both". The caption alone conditions the image: the official code can also draw behind input images, for
    editing, which would leak past the text.

    Args:
        checkpoint: Folder or hub id with the subfolders ``mllm``, ``processor``, ``transformer``, ``vae`` and ``scheduler``.
        condition_weights: Weights that read the captions for the renderer. "live": those in training. "start": those the run
            started from, which the transformer was trained with, so that its reading does not change during training.
        condition_tokens: Most tokens of a caption and its template that are read; longer captions are cut.
        negative_prompt: Prompt from which classifier-free guidance moves away, in the same template.
        reading: Settings with which the captioner is loaded and prompted.
        rendering: Size, steps, guidance and memory settings of the renderer.
    """

    def __init__(
        self,
        checkpoint: str = "OmniGen2/OmniGen2",
        condition_weights: Literal["live", "start"] = "live",
        condition_tokens: int = 1024,
        negative_prompt: str = "",
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        rendering: Rendering = Rendering(guidance=4.0),  # noqa: B008
    ) -> None:
        self.checkpoint, self.negative_prompt = checkpoint, negative_prompt
        self.condition_weights, self.condition_tokens = condition_weights, condition_tokens
        self.reading, self.rendering = reading, rendering

    def blueprint(self) -> Blueprint:
        """The networks of the system without weights: of the checkpoint if it is on this machine, else of the published sizes."""
        from uae.models.omnigen2.transformer import OmniGen2Transformer2DModel
        from uae.systems.blueprints import config_of, vae_skeleton, vlm_skeleton

        with torch.device("meta"):
            transformer: Any = OmniGen2Transformer2DModel.from_config(config_of(self.checkpoint, "transformer"))
        draws = self.rendering.placement
        transformer = nn.Module.to(transformer, torch.bfloat16)
        return Blueprint(
            vlm_skeleton(self.checkpoint, self.reading.dtype, "mllm"),
            {"transformer": (transformer, draws), "vae": (vae_skeleton(self.checkpoint), draws)},
            self.rendering, condition_tokens=self.condition_tokens, reading=self.reading, policy_reads=True,
            needs_reference=self.condition_weights == "start",
        )  # fmt: skip

    def build(self) -> UMM:
        """Load the parts on the CPU."""
        from uae.models.captioners.captioner import Frame
        from uae.models.captioners.loading import assemble_captioner, with_engine
        from uae.models.conditioners.prompts import chat_template
        from uae.models.conditioners.states import HiddenStateConditioner
        from uae.models.omnigen2.checkpoint import KEY, check_folders, load_language_model, load_pipeline
        from uae.models.renderers.diffusers import DiffusersRenderer
        from uae.weights.placement import torch_dtype

        folder = local_folder(self.checkpoint, KEY)
        check_folders(folder)
        model, processor = load_language_model(folder, getattr(torch, self.reading.dtype), self.reading.attention)
        vocabulary = processor.tokenizer.get_vocab()
        banned = [vocabulary[DRAWS]] if DRAWS in vocabulary else []
        captioner = assemble_captioner(model, processor, self.reading, IN_DETAIL, banned_ids=banned, frame=Frame(SYSTEM, LEAD))
        frozen = self.condition_weights == "start"
        conditioner = HiddenStateConditioner(
            lambda: captioner.language_model,
            processor.tokenizer,
            nn.Identity(),
            template=chat_template(processor, system=SYSTEM, prompt=False),
            max_tokens=self.condition_tokens,
            pooled="none",
            weights=captioner.learner.reference if frozen else nullcontext,
        )

        def negative() -> Any:
            with torch.no_grad():
                return conditioner.encode([self.negative_prompt])

        pipe = load_pipeline(folder, torch_dtype(self.rendering.placement))
        renderer = DiffusersRenderer(pipe, self.rendering, cache(negative) if frozen else negative)
        return UMM(with_engine(captioner, self.reading), conditioner, renderer, needs_reference=frozen)
