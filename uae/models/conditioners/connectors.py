"""Connectors: bidirectional transformers from a language model's query states to a diffusion model's condition.

Two published connectors, whose weights have the official names: OpenUni's (arXiv 2505.23661; e.g.
``layers.0.self_attn.q_proj.weight``) and MetaQuery's (arXiv 2504.06256; e.g. ``0.layers.0.self_attn.q_norm.gamma``,
``1.weight``, ``3.weight``, ``4.weight``). The number of queries is fixed, so there is no padding and no mask.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class OpenUniConnector(nn.Module):
    """Pre-norm encoder layers as in SigLIP: LayerNorm, biased attention, tanh-GELU MLP; no positions, no final norm.

    Args:
        width: Width D of the language model's hidden states and of the connector.
        inner_width: Width of the hidden layer of each MLP.
        layers: Number of layers; 6 in the released models.
        heads: Number of attention heads; None gives heads of width 64, as in the released models.
    """

    def __init__(self, width: int, inner_width: int, layers: int = 6, heads: int | None = None) -> None:
        super().__init__()
        heads = heads_of(width, heads)
        self.layers = nn.ModuleList([_OpenUniLayer(width, inner_width, heads) for _ in range(layers)])

    def forward(self, hidden_NQD: Tensor) -> Tensor:
        """Hidden states ``[N, Q, D]`` to the same shape. Every query attends to all queries."""
        for layer in self.layers:
            hidden_NQD = layer(hidden_NQD)
        return hidden_NQD


class _OpenUniLayer(nn.Module):
    def __init__(self, width: int, inner_width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attn, self.mlp = _OpenUniAttention(width, heads), _OpenUniMLP(width, inner_width)

    def forward(self, hidden_NQD: Tensor) -> Tensor:
        hidden_NQD = hidden_NQD + self.self_attn(self.layer_norm1(hidden_NQD))
        return hidden_NQD + self.mlp(self.layer_norm2(hidden_NQD))


class _OpenUniAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        for linear in (self.q_proj, self.k_proj, self.v_proj, self.out_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, hidden_NQD: Tensor) -> Tensor:
        query, key, value = (_split(p(hidden_NQD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(_merge(F.scaled_dot_product_attention(query, key, value)))


class _OpenUniMLP(nn.Module):
    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner_width), nn.Linear(inner_width, width)
        for linear in (self.fc1, self.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.normal_(linear.bias, std=1e-6)

    def forward(self, hidden_NQD: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(hidden_NQD), approximate="tanh"))


def metaquery_connector(
    width: int, width_out: int, layers: int = 24, heads: int | None = None, scale: float = math.sqrt(5.5)
) -> nn.Sequential:
    """MetaQuery's connector: bidirectional Qwen2 layers, then Linear, tanh-GELU, Linear, RMSNorm.

    Args:
        width: Width of the language model's hidden states and of the layers.
        width_out: Width of the renderer's embeddings.
        layers: Number of layers.
        heads: Number of attention heads; None gives heads of width 64.
        scale: Initial weight of the last norm. It gives the output the size of the embeddings that the renderer was trained
            on; sqrt(5.5) for Sana.
    """
    norm = nn.RMSNorm(width_out, eps=1e-5)
    nn.init.constant_(norm.weight, scale)
    encoder = MetaQueryEncoder(width, layers, heads)
    return nn.Sequential(encoder, nn.Linear(width, width_out), nn.GELU(approximate="tanh"), nn.Linear(width_out, width_out), norm)


class MetaQueryEncoder(nn.Module):
    """Qwen2 layers without a causal mask and without a final norm; rotary positions, then a norm of queries and keys.

    Args:
        width: Width D of the hidden states; each MLP is four times as wide inside.
        layers: Number of layers.
        heads: Number of attention heads; None gives heads of width 64.
    """

    def __init__(self, width: int, layers: int = 24, heads: int | None = None) -> None:
        super().__init__()
        self.head_width = width // heads_of(width, heads)
        self.layers = nn.ModuleList([_Qwen2Layer(width, self.head_width) for _ in range(layers)])
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.014)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, hidden_NQD: Tensor) -> Tensor:
        """Hidden states ``[N, Q, D]`` to the same shape. Every query attends to all queries."""
        rotation = _rotation(hidden_NQD.shape[1], self.head_width, hidden_NQD)
        for layer in self.layers:
            hidden_NQD = layer(hidden_NQD, rotation)
        return hidden_NQD


class _Qwen2Layer(nn.Module):
    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))
        self.self_attn, self.mlp = _Qwen2Attention(width, head_width), _Qwen2MLP(width, 4 * width)

    def forward(self, hidden_NQD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        hidden_NQD = hidden_NQD + self.self_attn(self.input_layernorm(hidden_NQD), rotation)
        return hidden_NQD + self.mlp(self.post_attention_layernorm(hidden_NQD))


class _Qwen2Attention(nn.Module):
    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads = width // head_width
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = _HeadNorm(self.heads, head_width), _HeadNorm(self.heads, head_width)

    def forward(self, hidden_NQD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        query, key, value = (_split(p(hidden_NQD), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        query, key = self.q_norm(_rotated(query, rotation)), self.k_norm(_rotated(key, rotation))
        return self.o_proj(_merge(F.scaled_dot_product_attention(query, key, value)))


class _HeadNorm(nn.Module):
    """Scales each head to length sqrt(width), times a learned gain per head."""

    def __init__(self, heads: int, head_width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(heads, 1, head_width))

    def forward(self, x_NHQD: Tensor) -> Tensor:
        return F.normalize(x_NHQD, dim=-1) * self.gamma * x_NHQD.shape[-1] ** 0.5


class _Qwen2MLP(nn.Module):
    def __init__(self, width: int, inner_width: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, inner_width, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(inner_width, width, bias=False)

    def forward(self, hidden_NQD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(hidden_NQD)) * self.up_proj(hidden_NQD))


def heads_of(width: int, heads: int | None) -> int:
    """The number of attention heads; None gives heads of width 64.

    Raises:
        ValueError: ``width`` is not divisible by the number of heads.
    """
    heads = heads or width // 64
    if heads < 1 or width % heads:
        raise ValueError(f"connector width {width} does not split into {heads} heads: give a count that divides it")
    return heads


def _split(x_NQD: Tensor, heads: int) -> Tensor:
    return x_NQD.unflatten(-1, (heads, -1)).transpose(1, 2)


def _merge(x_NHQD: Tensor) -> Tensor:
    return x_NHQD.transpose(1, 2).flatten(2)


def _rotation(length: int, head_width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine ``[Q, D]`` of the rotary positions 0, 1, ... (base 10000), in the precision of ``like``."""
    exponent = torch.arange(0, head_width, 2, device=like.device, dtype=torch.float32) / head_width
    angle = torch.arange(length, device=like.device, dtype=torch.float32)[:, None] * 10000.0**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _rotated(x_NHQD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    cosine_QD, sine_QD = rotation
    first, second = x_NHQD.chunk(2, dim=-1)
    return x_NHQD * cosine_QD + torch.cat([-second, first], dim=-1) * sine_QD
