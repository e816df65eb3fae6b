"""Draws images from caption states with OmniGen2's transformer, in the shape of a pipeline of diffusers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

UNSHIFTED = 40  # side of the latents (320 pixels) at which times are evenly spaced, as officially


class OmniGen2Pipeline(DiffusionPipeline):
    """Text to image from the states of captions, which another model has computed.

    Args:
        transformer: An `uae.models.omnigen2.transformer.OmniGen2Transformer2DModel`.
        vae: The ``AutoencoderKL`` of FLUX.
        scheduler: A ``FlowMatchEulerDiscreteScheduler`` of diffusers with ``invert_sigmas``: time 0 is noise, and 1 is the image.
    """

    transformer: Any
    vae: Any
    scheduler: Any

    def __init__(self, transformer: Any, vae: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        prompt_attention_mask: Tensor,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        guidance_scale: float = 4.0,
        height: int = 1024,
        width: int = 1024,
        num_inference_steps: int = 28,
        generator: list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pt",
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """Draw N images.

        Args:
            prompt_embeds: States of N captions ``[N, L, D]``, padded on the right.
            prompt_attention_mask: 1 for real tokens, ``[N, L]``.
            negative_prompt_embeds: States that guidance moves away from, ``[N, L, D]``.
            negative_prompt_attention_mask: 1 for real tokens, ``[N, L]``.
            guidance_scale: Scale of classifier-free guidance; there is none if it is 1 or less.
            height: Height of the images in pixels.
            width: Width of the images in pixels.
            num_inference_steps: Number of denoising steps.
            generator: One random generator per image.
            latents: Latents to start from instead of noise.
            output_type: "pt" returns pixels, "latent" returns latents.
            return_dict: False, as a tuple is returned.

        Returns:
            Images ``[N, 3, H, W]`` in [0, 1], or latents.
        """
        embeds, mask = prompt_embeds, prompt_attention_mask
        guided = guidance_scale > 1 and negative_prompt_embeds is not None and negative_prompt_attention_mask is not None
        if negative_prompt_embeds is not None and negative_prompt_attention_mask is not None and guided:
            embeds, mask = torch.cat([negative_prompt_embeds, embeds]), torch.cat([negative_prompt_attention_mask, mask])
        seen = None if mask.all() else mask  # attention without a mask is faster
        sides = height // self.vae_scale_factor, width // self.vae_scale_factor
        if latents is None:
            shape = (len(prompt_embeds), self.transformer.config.in_channels, *sides)
            latents = randn_tensor(shape, generator=generator, device=embeds.device, dtype=embeds.dtype)
        self.scheduler.set_timesteps(
            sigmas=np.linspace(1.0, 1.0 / num_inference_steps, num_inference_steps),
            mu=math.sqrt(math.prod(sides)) / UNSHIFTED,
            device=embeds.device,
        )
        for t in self.scheduler.timesteps:
            both = torch.cat([latents, latents]) if guided else latents
            time_N = (t / self.scheduler.config.num_train_timesteps).expand(len(both))
            velocity = self.transformer(both, time_N, embeds, seen, return_dict=False)[0]
            if guided:
                negative, positive = velocity.chunk(2)
                velocity = negative + guidance_scale * (positive - negative)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        return (latents if output_type == "latent" else self._pixels(latents),)

    def _pixels(self, latents: Tensor) -> Tensor:
        config = self.vae.config
        latents = latents.to(self.vae.dtype) / config.scaling_factor + (config.shift_factor or 0.0)
        image: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return (image * 0.5 + 0.5).clamp(0, 1)
