"""Sampling of tokens by uniform numbers, so that a row's token depends on its own seed and never on its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def uniforms(seeds: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers ``[N, steps]`` in [0, 1), float64, one independent stream per seed."""
    return torch.stack([torch.rand(steps, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds])


def draw(logp_NV: Tensor, uniform_N: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds the uniform number; never one of probability 0."""
    cumulative_NV = logp_NV.double().exp().cumsum(-1)
    target_N1 = (uniform_N * cumulative_NV[:, -1])[:, None]
    return torch.searchsorted(cumulative_NV, target_N1, right=True)[:, 0].clamp(max=logp_NV.shape[1] - 1)


def entropy(logp_NV: Tensor) -> Tensor:
    """Entropies ``[N]`` in nats of distributions given by their log-probs. Tokens of probability 0 count as 0."""
    lowest = torch.finfo(logp_NV.dtype).min  # times probability 0 it is 0, where -inf would be NaN
    return -(logp_NV.exp() * logp_NV.clamp(min=lowest)).sum(-1)
