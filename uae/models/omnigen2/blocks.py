"""The layers of OmniGen2's diffusion transformer. Names of weights are those of the official checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers.models.attention import AttentionModuleMixin
from torch import Tensor, nn
from torch.nn import functional as F

from uae.learner import Kept

TIME_WIDTH, SINUSOIDS, NORM_EPS = 1024, 256, 1e-5  # of every release; heads are normalised with this epsilon
THETA = 10000.0  # base of the frequencies of positions

Turn = tuple[Tensor, Tensor]  # cosines and sines [N, 1, T, E / 2] by which pairs of channels of a head are rotated


class Attention(nn.Module, AttentionModuleMixin):
    """Grouped-query attention of all tokens to all tokens that are not masked. By its type, adapters find its layers.

    Args:
        width: D, width of the tokens.
        heads: Number of query heads, each of width E = D / heads.
        groups: Number of key and value heads, each of which serves as many consecutive query heads.
    """

    def __init__(self, width: int, heads: int, groups: int) -> None:
        super().__init__()
        size = width // heads
        self.heads, self.groups = heads, groups
        self.to_q = nn.Linear(width, heads * size, bias=False)
        self.to_k = nn.Linear(width, groups * size, bias=False)
        self.to_v = nn.Linear(width, groups * size, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(heads * size, width, bias=False)])
        self.norm_q, self.norm_k = nn.RMSNorm(size, eps=NORM_EPS), nn.RMSNorm(size, eps=NORM_EPS)

    def forward(self, x_NTD: Tensor, turn: Turn, mask_NT: Tensor | None) -> Tensor:
        """Attend; ``mask_NT`` is True for real tokens, and None if all are real."""
        query, key, value = (
            layer(x_NTD).unflatten(2, (heads, -1)).transpose(1, 2)
            for layer, heads in ((self.to_q, self.heads), (self.to_k, self.groups), (self.to_v, self.groups))
        )
        query, key = rotated(self.norm_q(query), turn), rotated(self.norm_k(key), turn)
        shared = self.heads // self.groups
        key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
        mask = None if mask_NT is None else mask_NT[:, None, None]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        out_NTD: Tensor = self.to_out[0](out.transpose(1, 2).flatten(2))
        return out_NTD


class FeedForward(nn.Module):
    """SwiGLU without biases."""

    def __init__(self, width: int, inside: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, inside, bias=False)
        self.linear_2 = nn.Linear(inside, width, bias=False)
        self.linear_3 = nn.Linear(width, inside, bias=False)

    def forward(self, x_NTD: Tensor) -> Tensor:
        """Same shape."""
        out_NTD: Tensor = self.linear_2(F.silu(self.linear_1(x_NTD)) * self.linear_3(x_NTD))
        return out_NTD


class TimedNorm(nn.Module):
    """The first norm of a layer, with the scales and gates that all of the layer gets from the time."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.linear = nn.Linear(min(width, TIME_WIDTH), 4 * width)
        self.norm = nn.RMSNorm(width, eps=eps)

    def forward(self, x_NTD: Tensor, time_ND: Tensor) -> tuple[Tensor, ...]:
        """The scaled tokens; the gate of the attention, the scale and the gate of the feed-forward part, ``[N, 1, D]``."""
        scale, gate, scale_inside, gate_inside = self.linear(F.silu(time_ND))[:, None].chunk(4, dim=2)
        return self.norm(x_NTD) * (1 + scale), gate, scale_inside, gate_inside


class Block(nn.Module):
    """One layer: attention and a feed-forward part, each with a norm before and a norm behind it.

    Args:
        width: D, width of the tokens.
        heads: Number of query heads.
        groups: Number of key and value heads.
        inside: Width inside the feed-forward part.
        eps: Epsilon of the norms of tokens.
        timed: Whether the time scales and gates the layer. The layers that see the caption alone are not.
    """

    def __init__(self, width: int, heads: int, groups: int, inside: int, eps: float, timed: bool = True) -> None:
        super().__init__()
        self.attn, self.feed_forward = Attention(width, heads, groups), FeedForward(width, inside)
        self.norm1 = TimedNorm(width, eps) if timed else nn.RMSNorm(width, eps=eps)
        self.ffn_norm1, self.norm2, self.ffn_norm2 = (nn.RMSNorm(width, eps=eps) for _ in range(3))

    def forward(self, x_NTD: Tensor, turn: Turn, mask_NT: Tensor | None, time_ND: Tensor | None = None) -> Tensor:
        """Same shape. ``time_ND`` is needed if the layer is timed."""
        if isinstance(self.norm1, TimedNorm):
            assert time_ND is not None
            scaled, gate, scale_inside, gate_inside = self.norm1(x_NTD, time_ND)
            x_NTD = x_NTD + gate.tanh() * self.norm2(self.attn(scaled, turn, mask_NT))
            inner = self.feed_forward(self.ffn_norm1(x_NTD) * (1 + scale_inside))
            return x_NTD + gate_inside.tanh() * self.ffn_norm2(inner)
        x_NTD = x_NTD + self.norm2(self.attn(self.norm1(x_NTD), turn, mask_NT))
        return x_NTD + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x_NTD)))


class TimeEmbedding(nn.Module):
    """The time in [0, 1] as a vector: sinusoids and two linear layers."""

    def __init__(self, width: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.linear_1, self.linear_2 = nn.Linear(SINUSOIDS, width), nn.Linear(width, width)

    def forward(self, t_N: Tensor) -> Tensor:
        """Vectors ``[N, D]`` in the dtype of the weights. The sinusoids are computed in float32."""
        half = SINUSOIDS // 2
        frequencies = torch.exp(-math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=t_N.device) / half)
        angles = self.scale * (t_N.float()[:, None] * frequencies)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_1.weight.dtype)
        out_ND: Tensor = self.linear_2(F.silu(self.linear_1(waves)))
        return out_ND


class Embeddings(nn.Module):
    """What the network makes of the time and of the states of the caption."""

    def __init__(self, width: int, text_width: int, eps: float, scale: float) -> None:
        super().__init__()
        self.timestep_embedder = TimeEmbedding(min(width, TIME_WIDTH), scale)
        self.caption_embedder = nn.Sequential(nn.RMSNorm(text_width, eps=eps), nn.Linear(text_width, width))


class LastNorm(nn.Module):
    """The norm behind all layers, scaled by the time, and the projection to latents."""

    def __init__(self, width: int, width_out: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(min(width, TIME_WIDTH), width), nn.Linear(width, width_out)

    def forward(self, x_NTD: Tensor, time_ND: Tensor) -> Tensor:
        """Tokens ``[N, T, D]`` to patches of latents ``[N, T, width_out]``."""
        normal = F.layer_norm(x_NTD, x_NTD.shape[-1:], eps=1e-6)
        out_NTP: Tensor = self.linear_2(normal * (1 + self.linear_1(F.silu(time_ND)))[:, None])
        return out_NTP


def rotated(x_NHTE: Tensor, turn: Turn) -> Tensor:
    """Rotate neighbouring pairs of channels of queries or keys, in float32."""
    cos, sin = turn
    even, odd = x_NHTE.float().unflatten(3, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(3).type_as(x_NHTE)


def turn_of(places_NT3: Tensor, axes: Sequence[int]) -> Turn:
    """The rotation of tokens at three-dimensional places.

    Args:
        places_NT3: Places of the tokens, whole numbers.
        axes: Number of channels of a head that each of the three dimensions rotates; they are even.
    """
    angles = []
    for dimension, channels in enumerate(axes):
        powers = torch.arange(0, channels, 2, dtype=torch.float64, device=places_NT3.device) / channels
        angles.append(places_NT3[:, :, dimension, None].double() / THETA**powers)
    angle = torch.cat(angles, dim=2)[:, None]
    return angle.cos().float(), angle.sin().float()


def places(lengths_N: Tensor, text: int, height: int, width: int) -> Tensor:
    """Places ``[N, text + height * width, 3]`` of the tokens of a caption and of an image behind it.

    Token n of the caption is at (n, n, n). The image is at (length of the caption, row, column), whatever the padding between
    both.

    Args:
        lengths_N: Number of real tokens of every caption.
        text: Number of tokens of a caption, padding included.
        height: Number of rows of tokens of the image.
        width: Number of their columns.
    """
    device = lengths_N.device
    words = torch.arange(text, device=device)[:, None].expand(text, 3).expand(len(lengths_N), text, 3)
    rows, columns = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    grid = torch.stack([torch.zeros_like(rows), rows, columns], dim=2).flatten(0, 1).repeat(len(lengths_N), 1, 1)
    grid[:, :, 0] = lengths_N[:, None]
    return torch.cat([words, grid], dim=1)


def without_passes(module: nn.Module) -> Kept:
    """A module with the weights of another one, by the same names, as buffers: they are kept, and never train."""
    shell = Kept()
    for name, child in module.named_children():
        shell.add_module(name, without_passes(child))
    for name, weight in module.named_parameters(recurse=False):
        shell.register_buffer(name, weight.detach())
    return shell
