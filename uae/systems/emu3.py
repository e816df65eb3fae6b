"""Emu3 as UMM-2: one vocabulary and one output head for what it says and for what it draws, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from uae.models.captioners.loading import Reading
from uae.models.tokens.policy import LogProb, TokenSampling
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM

NEGATIVE = (  # of the official demonstration
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
KEY = "model.init_args.system.init_args.checkpoint"


class Emu3:
    """An Emu3 checkpoint in transformers' layout as a `uae.types.System`.

    Args:
        checkpoint: Folder or hub id, such as BAAI/Emu3-Gen-hf or BAAI/Emu3-Chat-hf. The original BAAI/Emu3-* need their
            authors' code and are refused.
        height, width: Of drawn images in pixels, multiples of 8; a token is 8 x 8.
        guidance: Classifier-free guidance of image tokens; part of the policy. 1 means none, at half the work.
        image_temperature: Of image tokens; part of the policy. 0 is greedy.
        cfg_logprob: What log-probs are under guidance, see `uae.models.tokens.policy.TokenSampling`.
        template: Text around a caption that is drawn; contains one "{caption}".
        negative_prompt: What guidance leads away from, in the caption's place.
        rows: Images drawn together; bounds memory, changes nothing else.
        reading: How the checkpoint is loaded and asked. ``min_pixels`` and ``max_pixels`` bound what it reads.
    """

    def __init__(
        self,
        checkpoint: str = "BAAI/Emu3-Gen-hf",
        height: int = 512,
        width: int = 512,
        guidance: float = 3.0,
        image_temperature: float = 1.0,
        cfg_logprob: LogProb = "guided",
        template: str = "{caption}",
        negative_prompt: str = NEGATIVE,
        rows: int = 8,
        reading: Reading = Reading(),  # noqa: B008 (frozen)
    ) -> None:
        self.sampling = TokenSampling(guidance, image_temperature, cfg_logprob)
        self.checkpoint, self.height, self.width = checkpoint, height, width
        self.template, self.negative_prompt, self.rows, self.reading = template, negative_prompt, rows, reading

    def blueprint(self) -> Blueprint:
        """Sizes, without weights."""
        from uae.models.tokens.emu3 import grid
        from uae.models.tokens.janus import as_buffers
        from uae.systems.blueprints import TokenDrawing, vlm_skeleton

        check_layout(self.checkpoint)
        policy = vlm_skeleton(self.checkpoint, self.reading.dtype)
        as_buffers(policy.model.vqmodel)
        read = (self.reading.min_pixels or 512 * 512) // 64  # what the released processor enlarges images to
        H, W = grid((self.height, self.width), policy.model.vqmodel.spatial_scale_factor)
        codes, pixels = policy.config.vq_config.codebook_size, self.height * self.width
        drawing = TokenDrawing(H * W, H * (W + 1) - 1, codes, pixels, self.sampling, self.rows)
        prompt = read + round(read**0.5) + 128
        return Blueprint(policy, prompt_tokens=prompt, reading=self.reading, drawing=drawing)

    def build(self) -> UMM:
        """Load the checkpoint; all three roles are its own."""
        from uae.models.captioners.loading import load_captioner
        from uae.models.tokens.emu3 import unify

        check_layout(self.checkpoint)
        reading = replace(self.reading, min_pixels=None, max_pixels=None)
        captioner = load_captioner(self.checkpoint, reading, IN_DETAIL)
        set_pixels(captioner.processor.image_processor, self.reading)
        return unify(captioner, self.height, self.width, self.sampling, self.rows, self.template, self.negative_prompt)


def set_pixels(images: Any, reading: Reading) -> None:
    """The pixel budget of what is read, by the names of Emu3's image processor."""
    least, most = reading.min_pixels or images.min_pixels, reading.max_pixels or images.max_pixels
    if not 0 < least <= most:
        raise ValueError(
            f"an image cannot have between {least} and {most} pixels; allowed: 0 < min_pixels <= max_pixels (the checkpoint's "
            "own where not given); change model.init_args.system.init_args.reading.min_pixels or .max_pixels"
        )
    images.min_pixels, images.max_pixels = least, most


def check_layout(checkpoint: str) -> None:
    """Raise unless a checkpoint is Emu3 in transformers' layout."""
    from uae.systems.blueprints import config_of

    original = checkpoint.startswith("BAAI/Emu3-") and not checkpoint.endswith("-hf")
    kind = "Emu3" if original else config_of(checkpoint).get("model_type")
    if kind == "Emu3":
        raise ValueError(
            f"{checkpoint!r} is in the original layout, which needs its authors' code; set {KEY} to a port to transformers, "
            "BAAI/Emu3-Gen-hf or BAAI/Emu3-Chat-hf"
        )
    if kind != "emu3":
        raise ValueError(f"{checkpoint!r} is of model_type {kind!r}; allowed: emu3, such as BAAI/Emu3-Gen-hf; change {KEY}")
