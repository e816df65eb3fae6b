"""Settings of a renderer, and the check that a pipeline can follow them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from uae.models.pipelines.contracts import Contract, denoiser_of
from uae.models.pipelines.passes import Interval, guided_at
from uae.models.pipelines.quirks import quirks_of
from uae.weights.placement import Placement

KEY = "model.init_args.system.init_args.rendering"


@dataclass(frozen=True)
class Rendering:
    """Settings of a renderer.

    Args:
        height: Height of the images in pixels. The pipeline determines of which number it must be a multiple.
        width: Width of the images in pixels, likewise.
        steps: Number of denoising steps, 1 or more.
        guidance: Classifier-free guidance scale: velocities are ``negative + guidance (positive - negative)``. 1 turns it off and
            saves the negative pass. Pipelines that call this 0 (Z-Image, Krea2) get a number that is smaller by 1.
        guidance_interval: Share of the denoising steps, from 0 (noise) to 1 (image), in which guidance is applied (Kynkaanniemi et
            al. 2024, arXiv 2404.07724): step i of n, counted from 0, is guided if i / n is at least the first number and below
            the second. In all other steps the negative pass is not computed. None and (0, 1) are all steps; anything else
            draws other images. A renderer that trains has the same interval in its samples and in its log-probs.
        distilled_guidance: Guidance scale that a distilled network takes as an input (FLUX.1-dev); None is the pipeline's
            default.
        rows: Number of images per pipeline call, 1 or more. It bounds memory and changes nothing else.
        placement: Device and dtype of the denoiser and the autoencoder.
        compile: Whether the blocks of the denoiser are compiled, for any batch size and length.
        slice_vae: Whether the autoencoder decodes one image at a time, which saves memory.
        tile_vae: Whether the autoencoder decodes in overlapping tiles, which saves memory and changes images slightly.
    """

    height: int = 512
    width: int = 512
    steps: int = 28
    guidance: float = 1.0
    guidance_interval: Interval | None = None
    distilled_guidance: float | None = None
    rows: int = 16
    placement: Placement = Placement()  # noqa: RUF009 (frozen)
    compile: bool = False
    slice_vae: bool = False
    tile_vae: bool = False


def check(rendering: Rendering, pipe: Any, contract: Contract, has_negative: bool) -> None:
    """Check that a pipeline can follow the settings. Otherwise it would ignore them, or fail much later.

    Args:
        rendering: The settings.
        pipe: The diffusers pipeline.
        contract: The contract of the pipeline.
        has_negative: Whether the system gives a negative condition.

    Raises:
        ValueError: The pipeline cannot follow a setting.
    """
    name = type(pipe).__name__
    _check_numbers(rendering, pipe, contract.quirks.steps)
    if rendering.guidance > 1:
        _check_guidance(rendering.guidance, pipe, contract, has_negative)
    if rendering.guidance_interval is not None:
        _check_interval(rendering, rendering.guidance_interval, pipe, contract)
    distils = contract.distilled and getattr(denoiser_of(pipe).config, "guidance_embeds", True)
    if rendering.distilled_guidance is not None and not distils:
        raise ValueError(
            f"rendering.distilled_guidance={rendering.distilled_guidance}, but this {name} is not distilled for guidance; "
            f"set {KEY}.distilled_guidance to null (and {KEY}.guidance for classifier-free guidance)"
        )


def _check_numbers(rendering: Rendering, pipe: Any, only_steps: int | None) -> None:
    name, of = type(pipe).__name__, multiple(pipe)
    for key in ("height", "width"):
        size = getattr(rendering, key)
        if size < 1 or size % of:
            raise ValueError(f"rendering.{key}={size} must be a multiple of {of} for {name}; change {KEY}.{key}")
    for key in ("steps", "rows"):
        if getattr(rendering, key) < 1:
            raise ValueError(f"rendering.{key}={getattr(rendering, key)} must be at least 1; change {KEY}.{key}")
    if only_steps not in (None, rendering.steps):
        raise ValueError(f"rendering.steps={rendering.steps}, but {name} takes exactly {only_steps} steps; change {KEY}.steps")


def _check_guidance(guidance: float, pipe: Any, contract: Contract, has_negative: bool) -> None:
    name = type(pipe).__name__
    if contract.guiders:
        _check_guiders(guidance, pipe, contract.guiders)
        return
    if getattr(pipe, "config", {}).get("is_distilled", False):
        raise ValueError(
            f"rendering.guidance={guidance}, but this {name} is distilled for drawing without guidance; set {KEY}.guidance to 1"
        )
    if contract.guidance is None:
        instead = f" (and {KEY}.distilled_guidance instead)" if contract.distilled else ""
        raise ValueError(
            f"rendering.guidance={guidance}, but {name} has no classifier-free guidance; set {KEY}.guidance to 1{instead}"
        )
    if has_negative and not contract.negatives:
        raise ValueError(f"{name} takes no negative condition (it has its own); leave the negative out")
    reads = getattr(pipe, "tokenizer", None) is not None
    if not has_negative and not (contract.own_negative and reads):
        raise ValueError(f"rendering.guidance={guidance} needs a negative condition; give one or set {KEY}.guidance to 1")


def _check_guiders(guidance: float, pipe: Any, guiders: tuple[str, ...]) -> None:
    """A pipeline that guides by components of its checkpoint has their scale, or no guidance."""
    parts = [getattr(pipe, name, None) for name in guiders]
    scales = {float(part.guidance_scale) for part in parts if part is not None}
    if scales != {guidance}:
        allowed = ", ".join(f"{scale:g}" for scale in sorted({1.0, *scales}))
        raise ValueError(
            f"rendering.guidance={guidance}, but {type(pipe).__name__} is guided by {' and '.join(guiders)} of its checkpoint; "
            f"allowed: {allowed if len(scales) < 2 else '1'}; change {KEY}.guidance"
        )


def _check_interval(rendering: Rendering, interval: Interval, pipe: Any, contract: Contract) -> None:
    name, scheduler = type(pipe).__name__, getattr(pipe, "scheduler", None)
    fault = ""
    if not 0 <= interval[0] < interval[1] <= 1:
        fault = "allowed: two numbers from 0 (noise) to 1 (image), the first below the second"
    elif rendering.guidance <= 1:
        fault = f"but rendering.guidance={rendering.guidance} applies none; allowed: null, or {KEY}.guidance above 1"
    elif not contract.quirks.negative_first:
        fault = f"but where {name} computes its negative pass is not known; allowed: null"
    elif getattr(scheduler, "order", 1) != 1:
        fault = f"but {type(scheduler).__name__} predicts more than once per step; allowed: null, or another scheduler"
    elif not any(guided_at(step, rendering.steps, interval) for step in range(rendering.steps)):
        fault = f"which none of {rendering.steps} steps is in; allowed: an interval with at least one i / {rendering.steps}"
    if fault:
        raise ValueError(f"rendering.guidance_interval={list(interval)}, {fault}; change {KEY}.guidance_interval")


def multiple(pipe: Any) -> int:
    """The number of which height and width must be multiples: pixels per latent times latents per token."""
    patch = getattr(getattr(denoiser_of(pipe), "config", None), "patch_size", 1)
    patch = max(patch) if isinstance(patch, tuple | list) else patch
    own = getattr(pipe, "vae_scale_factor", 1) * (patch or 1)
    processor = getattr(getattr(pipe, "image_processor", None), "config", None)
    return math.lcm(own * quirks_of(type(pipe)).size_factor, getattr(processor, "vae_scale_factor", 1))


def obey_size(pipe: Any, height: int, width: int) -> None:
    """Let a pipeline draw the size that it is asked for, where it would draw the nearest one that it was trained with."""
    how = quirks_of(type(pipe)).size_from
    if how == "area":
        pipe.default_sample_size = math.sqrt(height * width) / pipe.vae_scale_factor * (1 + 1e-9)  # it rounds the sides down
    elif how == "resolutions":
        pipe.resolutions = [(width, height)]


def compile_blocks(denoiser: Any) -> None:
    """Compile the blocks of a denoiser in place: those that its class names, or else those of its lists of blocks.

    Blocks of a kind share their code, so this takes less time than compiling the whole network. A copy of the denoiser computes
    with its own weights, uncompiled.

    Raises:
        ValueError: It has no blocks.
    """
    if getattr(denoiser, "_repeated_blocks", None):
        denoiser.compile_repeated_blocks(dynamic=True)
        return
    blocks = [block for part in denoiser.children() if isinstance(part, nn.ModuleList) for block in part]
    if not blocks:
        raise ValueError(f"{type(denoiser).__name__} has no blocks that could be compiled; set {KEY}.compile to false")
    for block in blocks:
        block.compile(dynamic=True)


def spare_memory(pipe: Any, rendering: Rendering) -> None:
    """Apply the settings that save memory: 8-bit weights, slices and tiles.

    Raises:
        ValueError: The denoiser or the autoencoder does not support a setting.
    """
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
                raise ValueError(f"the autoencoder of {type(pipe).__name__} cannot do this; set {KEY}.{key} to false") from None
