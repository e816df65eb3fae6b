"""Text masks for pipelines of diffusers that have none, or none per pass.

Without a mask, image tokens attend to the padding of a caption, and the padding changes every pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class MaskedJointAttention:
    """An attention processor of diffusers in which no token attends to masked text tokens.

    The transformer passes ``text_mask`` ``[N, L]`` (1 for real tokens) to it through ``joint_attention_kwargs``.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from image ``[N, I, D]`` and text ``[N, L, D]``. The outputs have the same shapes."""
        tokens_of_image = hidden_states.shape[1]
        query, key, value = _heads(attn, hidden_states, ("to_q", "to_k", "to_v"), ("norm_q", "norm_k"))
        mask = None
        if encoder_hidden_states is not None:
            names = ("add_q_proj", "add_k_proj", "add_v_proj"), ("norm_added_q", "norm_added_k")
            of_text = _heads(attn, encoder_hidden_states, *names)
            query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), of_text, strict=True))
            if text_mask is not None:
                image_mask = text_mask.new_ones(len(text_mask), tokens_of_image)
                mask = torch.cat([image_mask, text_mask], dim=1).bool()[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out = out.transpose(1, 2).flatten(2)
        image = attn.to_out[1](attn.to_out[0](out[:, :tokens_of_image]))
        if encoder_hidden_states is None:
            return image
        text = out[:, tokens_of_image:]
        return image, text if attn.context_pre_only else attn.to_add_out(text)


def _heads(attn: Any, x: Tensor, projections: tuple[str, ...], norms: tuple[str, str]) -> tuple[Tensor, ...]:
    """Query, key and value ``[N, heads, tokens, width]`` of the image or the text tokens."""
    query, key, value = (getattr(attn, name)(x).unflatten(2, (attn.heads, -1)).transpose(1, 2) for name in projections)
    norm_query, norm_key = (getattr(attn, name) for name in norms)
    return norm_query(query) if norm_query else query, norm_key(key) if norm_key else key, value


@contextmanager
def masked_cross_attention(unet: torch.nn.Module, mask_NL: Tensor) -> Iterator[None]:
    """Inside, the U-Net's cross-attention ignores text where the mask is 0.

    Args:
        unet: The denoiser.
        mask_NL: Mask of all N rows of a denoising step; rows of the negative pass come first.
    """

    def give(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return arguments, {**named, "encoder_attention_mask": mask_NL.bool()}

    hook = unet.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def masked_passes(transformer: torch.nn.Module, passes: Sequence[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Inside, a FLUX transformer ignores text where the mask of the current pass is 0.

    FLUX takes a mask of text and image tokens, but its pipeline gives the same mask to the positive and the negative pass.

    Args:
        transformer: The denoiser. Its pipeline must pass on the same embedding tensors, by which a pass is recognised.
        passes: Embeddings ``[N, L, D]`` and mask ``[N, L]`` of each pass.

    Raises:
        RuntimeError: The transformer is called with embeddings that are not among ``passes``.
    """

    def give(module: torch.nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        masks = [mask for embeds, mask in passes if embeds is named["encoder_hidden_states"]]
        if len(masks) != 1:
            raise RuntimeError(f"{type(transformer).__name__} was called with embeddings that no mask belongs to")
        image = named["hidden_states"]
        mask = torch.cat([masks[0].bool(), image.new_ones(image.shape[:2], dtype=torch.bool)], dim=1)
        attention = {**(named.get("joint_attention_kwargs") or {}), "attention_mask": mask[:, None, None]}
        return arguments, {**named, "joint_attention_kwargs": attention}

    hook = transformer.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
