"""The velocity that the denoiser of any flow-matching pipeline predicts at given latents and times.

Every pipeline passes conditions, guidance, positions and times to its transformer in its own way. So the pipeline itself is
called, for one step at the given times, with a scheduler whose step returns the predicted velocity.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from uae.models.pipelines.calls import Call
from uae.models.pipelines.steps import check_flow
from uae.models.renderers.diffusers import DiffusersRenderer, PipelineCondition
from uae.types import Renderer


def check_pipeline(renderer: Renderer) -> DiffusersRenderer:
    """Return the renderer if it is a diffusers pipeline that predicts velocities from embeddings.

    Raises:
        ValueError: The renderer is of another kind; the message says why.
    """
    if not isinstance(renderer, DiffusersRenderer):
        raise _no_flow(f"{type(renderer).__name__} is no diffusers pipeline")
    if not renderer.contract.takes_embeddings:
        raise _no_flow(f"{type(renderer.pipe).__name__} takes captions as text only")
    try:
        check_flow(renderer.pipe)
    except ValueError as error:
        names = f"{type(renderer.pipe).__name__} with {type(renderer.pipe.scheduler).__name__}"
        raise _no_flow(f"{names} does not draw by flow matching") from error
    return renderer


def _no_flow(reason: str) -> ValueError:
    return ValueError(
        f"DecoderTuning needs a flow-matching pipeline (Stable Diffusion 3, FLUX, Sana, Qwen-Image), but {reason}: change "
        "model.init_args.system"
    )


@torch.no_grad()
def latents_of(renderer: DiffusersRenderer, images_NCHW: Tensor) -> Tensor:
    """Encode images ``[N, 3, H, W]`` in [0, 1] as the latents that the pipeline works on, float32.

    The images are first scaled to the size that the pipeline draws. The latents are standardised, and packed into tokens
    where the pipeline does so.
    """
    pipe, config = renderer.pipe, renderer.pipe.vae.config
    size = renderer.rendering.height, renderer.rendering.width
    if images_NCHW.shape[-2:] != size:
        images_NCHW = F.interpolate(images_NCHW, size, mode="bicubic", antialias=True).clamp(0, 1)
    pixels = (images_NCHW * 2 - 1).to(pipe.vae.dtype)
    mean = getattr(config, "latents_mean", None)
    frames = hasattr(config, "temperal_downsample")  # an autoencoder of videos (Qwen-Image) takes an image as one frame
    encoded = pipe.vae.encode(pixels[:, :, None] if frames else pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
    latents = latents[:, :, 0].float() if frames else latents.float()
    if mean is not None:
        mean_C, std_C = (torch.tensor(x, device=latents.device) for x in (mean, config.latents_std))
        latents = (latents - mean_C[:, None, None]) / std_C[:, None, None]
    else:
        latents = (latents - (getattr(config, "shift_factor", None) or 0.0)) * (getattr(config, "scaling_factor", 1.0) or 1.0)
    if hasattr(pipe, "_pack_latents"):
        return pipe._pack_latents(latents, *latents.shape)
    return latents


def velocity_of(renderer: DiffusersRenderer, latents: Tensor, times_N: Tensor, condition: PipelineCondition) -> Tensor:
    """The denoiser's prediction of ``noise - latent``, float32, with gradient, without classifier-free guidance.

    Args:
        renderer: A renderer that `check_pipeline` accepts.
        latents: N latents in the layout of `latents_of`, noised.
        times_N: One time in [0, 1] per row; 0 is the image and 1 is noise.
        condition: The condition of the N rows.

    Returns:
        The velocity, in the shape of ``latents``.
    """
    once = copy.copy(renderer)
    once.rendering = replace(renderer.rendering, steps=1, guidance=1.0)

    def start(rows: list[int]) -> Call:
        return Call(None, latents[rows], functools.partial(_asking, times_N=times_N[rows]), output_type="latent")

    velocities: list[Tensor] = [latents] * len(latents)
    for rows, velocity in once.calls(condition, start, torch.is_grad_enabled()):
        for row, value in zip(rows, velocity, strict=True):
            velocities[row] = value
    return torch.stack(velocities).float()


@contextmanager
def _asking(pipe: Any, times_N: Tensor) -> Iterator[None]:
    """Inside, a call of the pipeline takes one step, with one time per row, and returns the predicted velocity.

    The pipeline's scheduler is changed in place, so it must be a copy.
    """
    scheduler = pipe.scheduler
    inverted = scheduler.config.get("invert_sigmas", False)  # t = 0 is noise, and the velocity points to the image
    asked_N = 1 - times_N if inverted else times_N

    @functools.wraps(scheduler.set_timesteps)  # pipelines inspect the signature of set_timesteps
    def set_timesteps(*arguments: Any, **named: Any) -> None:
        scheduler.timesteps = asked_N[None] * scheduler.config.num_train_timesteps

    def step(model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any) -> Any:
        velocity = -model_output if inverted else model_output
        return SimpleNamespace(prev_sample=velocity) if return_dict else (velocity,)

    scheduler.set_timesteps, scheduler.step = set_timesteps, step
    yield
