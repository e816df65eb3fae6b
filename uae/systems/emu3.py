"""Emu3 as UMM-2: one model with one vocabulary writes captions and draws images, token by token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from uae.models.captioners.loading import Reading
from uae.models.tokens.policy import LogProb, TokenSampling
from uae.systems.blueprints import Blueprint
from uae.systems.instructions import IN_DETAIL
from uae.types import UMM

NEGATIVE = (  # the negative prompt of the official demonstration
    "lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, worst quality, "
    "low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry."
)
KEY = "model.init_args.system.init_args.checkpoint"


class Emu3:
    """A `uae.types.System` of one Emu3 checkpoint in the layout of transformers.

    Args:
        checkpoint: Folder or hub id, such as BAAI/Emu3-Gen-hf or BAAI/Emu3-Chat-hf. The original BAAI/Emu3-* need their
            authors' code and are refused.
        height: Height of drawn images in pixels, a multiple of 8.
        width: Width of drawn images in pixels, a multiple of 8. One image token covers 8 x 8 pixels.
        guidance: Classifier-free guidance scale of image tokens, 1 or more; part of the policy. 1 turns it off and halves
            the work.
        image_temperature: Sampling temperature of image tokens, 0 or more; part of the policy. 0 is greedy.
        cfg_logprob: Which log-probs the policy reports under guidance, see `uae.models.tokens.policy.TokenSampling`.
        template: Prompt from which an image is drawn; contains "{caption}" exactly once.
        negative_prompt: Text that takes the place of the caption in the pass that guidance moves away from.
        rows: Number of images drawn in one batch. It bounds memory and changes nothing else.
        reading: Settings with which the checkpoint is loaded and prompted. ``min_pixels`` and ``max_pixels`` bound the area
            of the images that it reads.
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
        """The network of the system without its weights, for memory plans."""
        from uae.models.tokens.emu3 import grid
        from uae.models.tokens.janus import as_buffers
        from uae.systems.blueprints import TokenDrawing, vlm_skeleton

        check_layout(self.checkpoint)
        policy = vlm_skeleton(self.checkpoint, self.reading.dtype)
        as_buffers(policy.model.vqmodel)
        read = (self.reading.min_pixels or 512 * 512) // 64  # the released processor enlarges images to this area
        H, W = grid((self.height, self.width), policy.model.vqmodel.spatial_scale_factor)
        codes, pixels = policy.config.vq_config.codebook_size, self.height * self.width
        drawing = TokenDrawing(H * W, H * (W + 1) - 1, codes, pixels, self.sampling, self.rows)
        prompt = read + round(read**0.5) + 128
        return Blueprint(policy, prompt_tokens=prompt, reading=self.reading, drawing=drawing)

    def build(self) -> UMM:
        """Load the checkpoint on the CPU. It plays all three roles: captioner, conditioner and renderer."""
        from uae.models.captioners.loading import load_captioner, without_engine
        from uae.models.tokens.emu3 import unify

        check_layout(self.checkpoint)
        without_engine(self.reading, "Emu3")
        reading = replace(self.reading, min_pixels=None, max_pixels=None)
        captioner = load_captioner(self.checkpoint, reading, IN_DETAIL)
        set_pixels(captioner.processor.image_processor, self.reading)
        return unify(captioner, self.height, self.width, self.sampling, self.rows, self.template, self.negative_prompt)


def set_pixels(images: Any, reading: Reading) -> None:
    """Set the bounds on the area of images that Emu3's image processor produces.

    Raises:
        ValueError: The bounds are not positive or are in the wrong order.
    """
    least = images.min_pixels if reading.min_pixels is None else reading.min_pixels
    most = images.max_pixels if reading.max_pixels is None else reading.max_pixels
    if not 0 < least <= most:
        raise ValueError(
            f"an image cannot have between {least} and {most} pixels; allowed: 0 < min_pixels <= max_pixels (the checkpoint's "
            "own where not given); change model.init_args.system.init_args.reading.min_pixels or .max_pixels"
        )
    images.min_pixels, images.max_pixels = least, most


def check_layout(checkpoint: str) -> None:
    """Check that a checkpoint is Emu3 in the layout of transformers.

    Raises:
        ValueError: It is in another layout, or another model.
    """
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
