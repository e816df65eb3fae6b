"""BAGEL's language model: a Qwen2 with two sets of weights per layer, one for understanding and one for generation.

Tokens of text, of images that are read, and both marks around an image have the first set; tokens of an image that is drawn have
the second one, whose names end in ``_moe_gen``. Attention is one softmax over the keys of both (arXiv 2505.14683, section 2).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from uae.learner import Recomputable

Columns = tuple[int, int]  # the first column of the drawn tokens, and the one behind the last; the same in all rows


def by_set(x_NLD: Tensor, read: Callable[[Tensor], Tensor], drawn: Callable[[Tensor], Tensor], at: Columns | None) -> Tensor:
    """What one set of weights makes of drawn tokens, and the other set of all others.

    Args:
        x_NLD: The tokens.
        read: The weights for understanding.
        drawn: The weights for generation.
        at: Columns of the drawn tokens; None if there are none.
    """
    if at is None:
        return read(x_NLD)
    begin, end = at
    others = read(torch.cat([x_NLD[:, :begin], x_NLD[:, end:]], dim=1))
    return torch.cat([others[:, :begin], drawn(x_NLD[:, begin:end]), others[:, begin:]], dim=1)


def rotation_of(position_NL: Tensor, size: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[N, 1, L, D]`` of rotary positions (arXiv 2104.09864), in float32; both halves of D are the same.

    Args:
        position_NL: Positions of tokens.
        size: D, the size of a head.
        theta: Base of the wavelengths.
    """
    powers = torch.arange(0, size, 2, dtype=torch.float32, device=position_NL.device) / size
    angle_NLD = position_NL[..., None].float() * (1.0 / theta**powers)
    angle_N1LD = torch.cat([angle_NLD, angle_NLD], dim=-1)[:, None]
    return angle_N1LD.cos(), angle_N1LD.sin()


def rotated(x_NHLD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Queries or keys, turned by their positions in float32."""
    cos, sin = rotation
    first, second = x_NHLD.float().chunk(2, dim=-1)
    turned: Tensor = x_NHLD.float() * cos + torch.cat([-second, first], dim=-1) * sin
    return turned.to(x_NHLD.dtype)


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys, and two sets of weights.

    Args:
        config: A ``Qwen2Config``.
        number: Number of the layer, by which a cache knows it.
    """

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        self.number, self.heads, self.groups = number, config.num_attention_heads, config.num_key_value_heads
        self.size = config.hidden_size // self.heads
        for end in ("", "_moe_gen"):
            self.add_module(f"q_proj{end}", nn.Linear(config.hidden_size, self.heads * self.size))
            self.add_module(f"k_proj{end}", nn.Linear(config.hidden_size, self.groups * self.size))
            self.add_module(f"v_proj{end}", nn.Linear(config.hidden_size, self.groups * self.size))
            self.add_module(f"o_proj{end}", nn.Linear(self.heads * self.size, config.hidden_size, bias=False))
            self.add_module(f"q_norm{end}", nn.RMSNorm(self.size, config.rms_norm_eps))
            self.add_module(f"k_norm{end}", nn.RMSNorm(self.size, config.rms_norm_eps))

    def _set(self, end: str) -> Callable[[Tensor], Tensor]:
        """Queries, keys and values of one set of weights, side by side: ``[N, L, heads + 2 groups, D]``."""
        q, k, v = (getattr(self, f"{name}_proj{end}") for name in "qkv")
        q_norm, k_norm = getattr(self, f"q_norm{end}"), getattr(self, f"k_norm{end}")

        def project(x_NLD: Tensor) -> Tensor:
            split = (-1, self.size)
            queries, keys, values = (layer(x_NLD).unflatten(-1, split) for layer in (q, k, v))
            return torch.cat([q_norm(queries).to(values.dtype), k_norm(keys).to(values.dtype), values], dim=2)

        return project

    def forward(self, x_NLD: Tensor, rotation: tuple[Tensor, Tensor], see: Tensor | None, cache: Any, at: Columns | None) -> Tensor:
        """Attention of L tokens to those in the cache and to each other, see `Decoder.forward`."""
        every_NHLD = by_set(x_NLD, self._set(""), self._set("_moe_gen"), at).transpose(1, 2)
        query, key, value = every_NHLD.split((self.heads, self.groups, self.groups), dim=1)
        query, key = rotated(query, rotation), rotated(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.number)
        if see is not None and self.groups < self.heads:  # fused kernels with a mask take one head of keys per head of queries
            key, value = (x.repeat_interleave(self.heads // self.groups, dim=1) for x in (key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=see, is_causal=see is None and query.shape[2] > 1, enable_gqa=see is None
        )
        return by_set(out.transpose(1, 2).flatten(2), self.get_submodule("o_proj"), self.get_submodule("o_proj_moe_gen"), at)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inside, bias=False)
        self.up_proj = nn.Linear(width, inside, bias=False)
        self.down_proj = nn.Linear(inside, width, bias=False)

    def forward(self, x_NLD: Tensor) -> Tensor:
        """Tokens to tokens."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_NLD)) * self.up_proj(x_NLD))
        return out


class Layer(Recomputable):
    """One layer of the decoder: attention, then a feed-forward network, each with a norm before it and a residual."""

    def __init__(self, config: Any, number: int) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.self_attn = Attention(config, number)
        self.mlp, self.mlp_moe_gen = (FeedForward(width, config.intermediate_size) for _ in range(2))
        self.input_layernorm, self.input_layernorm_moe_gen = (nn.RMSNorm(width, eps) for _ in range(2))
        self.post_attention_layernorm, self.post_attention_layernorm_moe_gen = (nn.RMSNorm(width, eps) for _ in range(2))

    def forward(self, x_NLD: Tensor, rotation: tuple[Tensor, Tensor], see: Tensor | None, cache: Any, at: Columns | None) -> Tensor:
        """See `Decoder.forward`."""
        normed_NLD = by_set(x_NLD, self.input_layernorm, self.input_layernorm_moe_gen, at)
        x_NLD = x_NLD + self.self_attn(normed_NLD.to(x_NLD.dtype), rotation, see, cache, at)

        def read(part: Tensor) -> Tensor:
            return part + self.mlp(self.post_attention_layernorm(part).to(part.dtype))

        def drawn(part: Tensor) -> Tensor:
            return part + self.mlp_moe_gen(self.post_attention_layernorm_moe_gen(part).to(part.dtype))

        return by_set(x_NLD, read, drawn, at)


class Decoder(nn.Module):
    """All layers, called as a decoder of transformers is.

    Args:
        config: A ``Qwen2Config``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.embed_tokens = nn.Embedding(config.vocab_size, width)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(config.num_hidden_layers))
        self.norm, self.norm_moe_gen = (nn.RMSNorm(width, eps) for _ in range(2))
        self.size, self.theta = width // config.num_attention_heads, float(config.rope_parameters["rope_theta"])

    def get_output_embeddings(self) -> None:
        """None, because the head is not part of this module."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool = False,
        drawn: Columns | None = None,
    ) -> Any:
        """Final hidden states of L tokens behind those in a cache.

        Args:
            input_ids: ``[N, L]`` token ids, unless ``inputs_embeds`` are given.
            attention_mask: Bool ``[N, 1, L, K]``, whether a token sees each of the K tokens in the cache and among the L. None:
                all before it; several tokens then need an empty cache.
            position_ids: ``[N, L]`` rotary positions; None counts from 0.
            cache: A cache of transformers, which the keys and values are added to; None keeps none.
            inputs_embeds: ``[N, L, D]`` embeddings.
            use_cache: Whether the cache is used.
            drawn: Columns that have the weights for generation.

        Returns:
            An object with ``last_hidden_state`` ``[N, L, D]``, after the final norm.
        """
        x_NLD: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x_NLD.shape[1], device=x_NLD.device)[None]
        rotation = rotation_of(position_ids, self.size, self.theta)
        for layer in self.layers:
            x_NLD = layer(x_NLD, rotation, attention_mask, cache if use_cache else None, drawn)
        return SimpleNamespace(last_hidden_state=by_set(x_NLD, self.norm, self.norm_moe_gen, drawn).to(x_NLD.dtype))


class LanguageModel(nn.Module):
    """The decoder and its output head.

    Args:
        config: A ``Qwen2Config``.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
