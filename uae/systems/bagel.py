"""BAGEL as UMM-2: one network with two sets of weights captions an image, and draws it again from the caption by denoising."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from uae.files.locations import here, local_folder
from uae.models.bagel.renderer import BagelRendering
from uae.models.captioners.loading import Reading
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM

KEY = "model.init_args.system.init_args"


class Bagel:
    """A `uae.types.System` of one BAGEL checkpoint in the official layout.

    Captions are tokens and images are denoising steps of the same network. It trains with ``model.init_args.train`` set to
    "captions", or, with ``model.init_args.exploration``, "images" or "both". The caption alone conditions the image: the
    official code can also draw behind an image in the context, for editing, which would leak past the text.

    Args:
        checkpoint: Folder or hub id with ``ema.safetensors``, ``ae.safetensors``, ``llm_config.json``, ``vit_config.json`` and
            the tokenizer.
        condition_tokens: Most tokens of a caption, its two marks included, that an image is drawn from; longer captions are cut.
        reading: Settings with which the checkpoint is loaded and prompted. Of the bounds on images, ``max_pixels`` applies.
        rendering: Size, steps, guidance and the other settings of drawing.
    """

    def __init__(
        self,
        checkpoint: str = "ByteDance-Seed/BAGEL-7B-MoT",
        condition_tokens: int = 1024,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
        rendering: BagelRendering = BagelRendering(),  # noqa: B008 (frozen)
    ) -> None:
        self.checkpoint, self.condition_tokens = checkpoint, condition_tokens
        self.reading, self.rendering = reading, rendering

    def blueprint(self) -> Blueprint:
        """The networks of the system without weights: of the checkpoint if it is on this machine, else of the published sizes."""
        from uae.models.bagel.captioner import BagelPolicy, Marks
        from uae.models.bagel.checkpoint import autoencoder_without_weights, config_from, config_in
        from uae.models.bagel.model import without_weights
        from uae.models.bagel.pixels import Scaling
        from uae.systems.blueprints import StepDrawing, config_of

        check(self.reading)
        folder = here(self.checkpoint)
        if folder is not None:
            config = config_in(folder)
        else:
            config = config_from(*(config_of(self.checkpoint, file=f"{part}_config.json") for part in ("llm", "vit")))
        draws, dtype = self.rendering, getattr(torch, self.reading.dtype)
        vae = autoencoder_without_weights(folder)
        side = config.latent_patch * 2 ** (len(vae.config.block_out_channels) - 1)
        tokens = draws.height // side * (draws.width // side)
        guided = sum(draws.guided_at(t) for t in draws.times)
        drawing = StepDrawing(
            tokens + 2, tokens * config.latent_width, (draws.height, draws.width), draws.steps, guided, draws.rows, draws.placement
        )
        patches = (Scaling().shortest // Scaling().patch) ** 2

        def network(model: nn.Module, again: bool) -> BagelPolicy:
            return BagelPolicy(model, (), Marks(0, 1, 2, 3), again)

        return Blueprint(
            without_weights(config, dtype), {"vae": (vae, draws.placement)}, prompt_tokens=patches + 128, reading=self.reading,
            condition_tokens=self.condition_tokens, drawing=drawing, network=network,
        )  # fmt: skip

    def build(self) -> UMM:
        """Load the checkpoint on the CPU. It plays all three roles: captioner, conditioner and renderer."""
        from transformers import Qwen2Tokenizer

        from uae.models.bagel.captioner import BagelCaptioner, BagelProcessor
        from uae.models.bagel.checkpoint import load, load_autoencoder
        from uae.models.bagel.conditioner import BagelConditioner
        from uae.models.bagel.pixels import Scaling
        from uae.models.bagel.renderer import BagelRenderer
        from uae.weights.placement import torch_dtype
        from uae.weights.remote_code import refused

        check(self.reading)
        folder = local_folder(self.checkpoint, f"{KEY}.checkpoint")
        model = load(folder, getattr(torch, self.reading.dtype))
        with refused(self.checkpoint):
            tokenizer: Any = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        patch, longest = model.config.vision_config.patch_size, model.config.vision_config.image_size
        scaling = Scaling(longest=longest, patch=patch, most=self.reading.max_pixels or Scaling().most)
        asked = IN_DETAIL if self.reading.instruction is None else self.reading.instruction
        captioner = BagelCaptioner(model, BagelProcessor(tokenizer, scaling), asked, self.reading.gradient_checkpointing)
        autoencoder = load_autoencoder(folder, torch_dtype(self.rendering.placement))
        renderer = BagelRenderer(captioner.learner, autoencoder, self.rendering)
        return UMM(captioner, BagelConditioner(tokenizer, self.condition_tokens), renderer)


def check(reading: Reading) -> None:
    """Refuse settings that BAGEL's network here does not follow.

    Raises:
        ValueError: One of them is set.
    """
    fixed: dict[str, tuple[Any, ...]] = {
        "image_first": (None, True), "min_pixels": (None,), "attention": (None, "sdpa"), "compile": (False,), "engine": (None,),
        "trust_remote_code": (None,),
    }  # fmt: skip
    for key, allowed in fixed.items():
        if (value := getattr(reading, key)) not in allowed:
            words = " or ".join("null" if one is None else str(one).lower() for one in allowed)
            raise ValueError(
                f"reading.{key}={value}, which BAGEL's network does not follow; allowed: {words}; change {KEY}.reading.{key}"
            )
    if reading.max_pixels is not None and reading.max_pixels < 14 * 14:
        raise ValueError(f"reading.max_pixels={reading.max_pixels}; allowed: 196 or more; change {KEY}.reading.max_pixels")
