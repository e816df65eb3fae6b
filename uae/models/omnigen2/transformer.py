"""OmniGen2's diffusion transformer: caption states and latents to the velocity of the latents.

Written from the description of the official network. The class has the official name, because configurations name it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from uae.models.omnigen2.blocks import Block, Embeddings, LastNorm, places, turn_of, without_passes

REFERENCES = 5  # number of input images that the official network tells apart


class OmniGen2Transformer2DModel(ModelMixin, ConfigMixin):  # type: ignore[misc]  # both have a config_name
    """A diffusion transformer over the tokens of a caption and of the latents.

    Officially it can also see input images, for editing, which would leak past the text. Those weights are read and exported, but
    not used: they are buffers, so that neither an adapter nor full finetuning trains them.

    The defaults are the released sizes.

    Args:
        patch_size: Side of the square of latent pixels that is one token.
        in_channels: Channels of the latents.
        out_channels: Channels of the velocity; None is ``in_channels``.
        hidden_size: D, width of the tokens.
        num_layers: Number of layers that see caption and latents.
        num_refiner_layers: Number of layers that see the caption alone, and of those that see the latents alone.
        num_attention_heads: Number of query heads.
        num_kv_heads: Number of key and value heads.
        multiple_of: The width inside the feed-forward part is the next multiple of this number.
        ffn_dim_multiplier: Factor of that width, which is else 4 D.
        norm_eps: Epsilon of the norms.
        axes_dim_rope: Channels of a head that rotate with each of the three dimensions of a place.
        axes_lens: Official bounds on places, which are not needed here.
        text_feat_dim: Width of the states of the caption.
        timestep_scale: The number that times in [0, 1] are multiplied by.

    Raises:
        ValueError: The channels that rotate are not those of a head.
    """

    _supports_gradient_checkpointing = True
    _skip_layerwise_casting_patterns: Any = ("x_embedder", "norm")

    @register_to_config
    def __init__(
        self,
        patch_size: int = 2,
        in_channels: int = 16,
        out_channels: int | None = None,
        hidden_size: int = 2520,
        num_layers: int = 32,
        num_refiner_layers: int = 2,
        num_attention_heads: int = 21,
        num_kv_heads: int = 7,
        multiple_of: int = 256,
        ffn_dim_multiplier: float | None = None,
        norm_eps: float = 1e-5,
        axes_dim_rope: Sequence[int] = (40, 40, 40),
        axes_lens: Sequence[int] = (10000, 10000, 10000),
        text_feat_dim: int = 2048,
        timestep_scale: float = 1000.0,
    ) -> None:
        super().__init__()
        if sum(axes_dim_rope) * num_attention_heads != hidden_size or num_attention_heads % num_kv_heads:
            raise ValueError(
                f"axes_dim_rope={list(axes_dim_rope)}, {num_attention_heads} heads and {num_kv_heads} key heads do not divide "
                f"hidden_size={hidden_size}; correct transformer/config.json of the checkpoint"
            )
        inside = 4 * hidden_size if ffn_dim_multiplier is None else int(ffn_dim_multiplier * 4 * hidden_size)
        sizes = (hidden_size, num_attention_heads, num_kv_heads, -(-inside // multiple_of) * multiple_of, norm_eps)
        self.patch, self.axes = patch_size, tuple(axes_dim_rope)
        latent = patch_size**2 * in_channels

        def layers(count: int, timed: bool = True) -> nn.ModuleList:
            return nn.ModuleList([Block(*sizes, timed=timed) for _ in range(count)])

        self.x_embedder = nn.Linear(latent, hidden_size)
        self.time_caption_embed = Embeddings(hidden_size, text_feat_dim, norm_eps, timestep_scale)
        self.noise_refiner = layers(num_refiner_layers)
        self.context_refiner = layers(num_refiner_layers, timed=False)
        self.layers = layers(num_layers)
        self.norm_out = LastNorm(hidden_size, patch_size**2 * (out_channels or in_channels))
        self.ref_image_patch_embedder = without_passes(nn.Linear(latent, hidden_size))
        self.ref_image_refiner = without_passes(layers(num_refiner_layers))
        self.register_buffer("image_index_embedding", torch.zeros(REFERENCES, hidden_size))
        self.gradient_checkpointing = False

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """The velocity ``[N, C, H, W]``, which points to the image.

        Args:
            hidden_states: Latents ``[N, C, H, W]``.
            timestep: Times ``[N]`` from 0 (noise) to 1 (image), in float32.
            encoder_hidden_states: States of the captions ``[N, L, text_feat_dim]``, padded on the right.
            encoder_attention_mask: 1 for real tokens, ``[N, L]``; None if all are real.
            return_dict: Whether the velocity is returned in an object of diffusers, or in a tuple.
        """
        patch, text = self.patch, encoder_hidden_states.shape[1]
        count, channels, height, width = hidden_states.shape
        rows, columns = height // patch, width // patch
        mask_NL = None if encoder_attention_mask is None else encoder_attention_mask.bool()
        lengths_N = torch.full((count,), text, device=hidden_states.device) if mask_NL is None else mask_NL.sum(1)
        cos, sin = turn_of(places(lengths_N, text, rows, columns), self.axes)
        time_ND = self.time_caption_embed.timestep_embedder(timestep)
        words_NLD = self.time_caption_embed.caption_embedder(encoder_hidden_states)
        for layer in self.context_refiner:
            words_NLD = self._run(layer, words_NLD, (cos[:, :, :text], sin[:, :, :text]), mask_NL)
        patches = hidden_states.view(count, channels, rows, patch, columns, patch).permute(0, 2, 4, 3, 5, 1)
        image_NID = self.x_embedder(patches.flatten(3).flatten(1, 2))
        for layer in self.noise_refiner:
            image_NID = self._run(layer, image_NID, (cos[:, :, text:], sin[:, :, text:]), None, time_ND)
        x_NTD = torch.cat([words_NLD, image_NID], dim=1)
        mask_NT = None if mask_NL is None else torch.cat([mask_NL, mask_NL.new_ones(count, rows * columns)], dim=1)
        for layer in self.layers:
            x_NTD = self._run(layer, x_NTD, (cos, sin), mask_NT, time_ND)
        out = self.norm_out(x_NTD[:, text:], time_ND).view(count, rows, columns, patch, patch, -1)
        velocity = out.permute(0, 5, 1, 3, 2, 4).reshape(count, -1, height, width)
        return Transformer2DModelOutput(sample=velocity) if return_dict else (velocity,)

    def _run(self, layer: Any, *inputs: Any) -> Any:
        """A layer's output. With gradient checkpointing, the backward pass computes the layer again."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            again: Any = self._gradient_checkpointing_func
            return again(layer, *inputs)
        return layer(*inputs)
