"""Settings of a renderer, and whether a pipeline can follow them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from uae.models.pipelines.contracts import Contract, denoiser_of
from uae.weights.placement import Placement

KEY = "model.init_args.system.init_args.rendering"


@dataclass(frozen=True)
class Rendering:
    """How images are drawn.

    Args:
        height, width: In pixels.
        steps: Denoising steps.
        guidance: Classifier-free guidance scale; 1 means none, and no second pass.
        distilled_guidance: Guidance as an input of a distilled network (FLUX.1-dev); None is the pipeline's default.
        rows: Images per pipeline call; bounds memory, changes nothing else.
        placement: Of the denoiser and the autoencoder.
        compile: Compile the denoiser (for any batch size and length).
        slice_vae: Decode one image at a time.
        tile_vae: Decode large images in overlapping tiles, which differs a little from decoding them whole.
    """

    height: int = 512
    width: int = 512
    steps: int = 28
    guidance: float = 1.0
    distilled_guidance: float | None = None
    rows: int = 16
    placement: Placement = Placement()  # noqa: RUF009 (frozen)
    compile: bool = False
    slice_vae: bool = False
    tile_vae: bool = False


def check(rendering: Rendering, pipe: Any, contract: Contract, has_negative: bool) -> None:
    """Raise where the pipeline would ignore a setting, or fail on it much later."""
    name = type(pipe).__name__
    multiple = _multiple(pipe)
    for key in ("height", "width"):
        size = getattr(rendering, key)
        if size < 1 or size % multiple:
            raise ValueError(
                f"rendering.{key}={size} must be a multiple of {multiple} for {name}; change {KEY}.{key}"
            )
    for key in ("steps", "rows"):
        if getattr(rendering, key) < 1:
            raise ValueError(f"rendering.{key}={getattr(rendering, key)} must be at least 1; change {KEY}.{key}")
    if rendering.guidance > 1:
        _check_guidance(rendering.guidance, pipe, contract, has_negative)
    distils = contract.distilled and getattr(denoiser_of(pipe).config, "guidance_embeds", True)
    if rendering.distilled_guidance is not None and not distils:
        raise ValueError(
            f"rendering.distilled_guidance={rendering.distilled_guidance}, but this {name} is not distilled for guidance; "
            f"set {KEY}.distilled_guidance to null (and {KEY}.guidance for classifier-free guidance)"
        )


def _check_guidance(guidance: float, pipe: Any, contract: Contract, has_negative: bool) -> None:
    name = type(pipe).__name__
    if contract.guidance is None:
        instead = f" (and {KEY}.distilled_guidance instead)" if contract.distilled else ""
        raise ValueError(
            f"rendering.guidance={guidance}, but {name} has no classifier-free guidance; set {KEY}.guidance to 1{instead}"
        )
    if has_negative and not contract.negatives:
        raise ValueError(f"{name} takes no negative condition (it has its own); leave the negative out")
    reads = getattr(pipe, "tokenizer", None) is not None
    if not has_negative and not (contract.own_negative and reads):
        raise ValueError(
            f"rendering.guidance={guidance} needs a negative condition; give one or set {KEY}.guidance to 1"
        )


def _multiple(pipe: Any) -> int:
    """What height and width must be multiples of: pixels per latent, times latents per token."""
    patch = getattr(getattr(denoiser_of(pipe), "config", None), "patch_size", 1)
    patch = max(patch) if isinstance(patch, tuple | list) else patch
    own = getattr(pipe, "vae_scale_factor", 1) * (patch or 1)
    processor = getattr(getattr(pipe, "image_processor", None), "config", None)
    return math.lcm(own, getattr(processor, "vae_scale_factor", 1))


def spare_memory(pipe: Any, rendering: Rendering) -> None:
    """Slices, tiles and 8-bit weights, where the classes have them."""
    if rendering.placement.dtype == "float8":
        denoiser = denoiser_of(pipe)
        if not hasattr(denoiser, "enable_layerwise_casting"):
            kind = type(denoiser).__name__
            raise ValueError(f"{kind} cannot store 8-bit weights; set {KEY}.placement.dtype to bfloat16")
        denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for key, switch in (("slice_vae", "enable_slicing"), ("tile_vae", "enable_tiling")):
        if getattr(rendering, key):
            try:
                getattr(pipe.vae, switch)()
            except (AttributeError, NotImplementedError):
                raise ValueError(
                    f"the autoencoder of {type(pipe).__name__} cannot do this; set {KEY}.{key} to false"
                ) from None
