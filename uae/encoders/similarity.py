"""The cosine similarity that rewards and metrics share."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Cosine similarity of the rows of two matrices, in float32 whatever the surrounding autocast.

    Args:
        a_ND: Embeddings ``[N, D]``, of any length above 0.
        b_ND: Embeddings ``[N, D]`` that the rows of ``a_ND`` are compared with, one by one.

    Returns:
        float32 ``[N]`` in [-1, 1]; NaN where one of the two rows holds NaN or infinity, or zeros only.

    Raises:
        ValueError: The two shapes differ, or they are not ``[N, D]``.
    """
    if a_ND.ndim != 2 or a_ND.shape != b_ND.shape:
        raise ValueError(f"similarity needs two [N, D] of one shape, got {list(a_ND.shape)} and {list(b_ND.shape)}")
    with torch.autocast(a_ND.device.type, enabled=False):
        a_ND, b_ND = (x.float() / x.float().norm(dim=1, keepdim=True) for x in (a_ND, b_ND))
        return (a_ND * b_ND).sum(dim=1).clamp(-1, 1)
