"""A diffusers autoencoder whose latent cells are non-overlapping pixel patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

PATCH = 8


class PatchAutoencoder(AutoencoderTiny):
    """`diffusers.AutoencoderTiny` over 8 x 8 pixel patches folded into channels: a stride of 8 without strided convolutions.

    Strided convolutions blur one-pixel features across cells; folding keeps every object inside its latent cell.
    Images are ``[N, 3, H, W]`` in [-1, 1], latents ``[N, C, H/8, W/8]`` of unit variance.
    """

    @classmethod
    def create(cls, latent_channels: int = 16, width: int = 96, blocks: int = 2) -> PatchAutoencoder:
        """A fresh one. Kernels start at their centre tap, so that cells start independent of their neighbours."""
        channels = 3 * PATCH**2
        sides = {f"{side}_block_out_channels": (width,) for side in ("encoder", "decoder")}
        counts = {f"num_{side}_blocks": (blocks,) for side in ("encoder", "decoder")}
        model = cls(in_channels=channels, out_channels=channels, latent_channels=latent_channels, **sides, **counts)
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d) and module.kernel_size == (3, 3):
                centre = module.weight.data[:, :, 1, 1].clone() * 3  # as large as the nine taps together
                module.weight.data.zero_()
                module.weight.data[:, :, 1, 1] = centre
        return model

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Leave out what diffusers derives and would warn about on loading."""
        super().save_config(save_directory, push_to_hub, **kwargs)
        file = Path(save_directory) / self.config_name
        config = json.loads(file.read_text())
        config.pop("block_out_channels", None)
        file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def encode(self, x: Tensor, return_dict: bool = True) -> Any:
        """Images to latents."""
        return super().encode(F.pixel_unshuffle(x, PATCH), return_dict=return_dict)

    def decode(self, x: Tensor, generator: Any = None, return_dict: bool = True) -> Any:
        """Latents to images."""
        out = super().decode(x, return_dict=True)
        out.sample = F.pixel_shuffle(out.sample, PATCH)
        return out if return_dict else (out.sample,)

    @torch.no_grad()
    def standardize(self, latents_NCHW: Tensor) -> None:
        """Fold per-channel mean and deviation into the encoder's last layer: latents then have unit variance."""
        last = [module for module in self.encoder.modules() if isinstance(module, torch.nn.Conv2d)][-1]
        mean, deviation = latents_NCHW.mean((0, 2, 3)), latents_NCHW.std((0, 2, 3))
        last.weight.div_(deviation[:, None, None, None])
        assert last.bias is not None
        last.bias.sub_(mean).div_(deviation)
