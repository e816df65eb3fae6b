"""The one cosine that rewards and metrics share."""

from __future__ import annotations

import torch
from torch import Tensor


def similarity(a_ND: Tensor, b_ND: Tensor) -> Tensor:
    """Row-wise cosine similarity.

    Args:
        a_ND: Embeddings ``[N, D]``; need not be normalised.
        b_ND: Embeddings ``[N, D]``.

    Returns:
        float32 ``[N]`` in [-1, 1]. NaN where a row has no direction: NaN or Inf inside, or all zeros.

    Raises:
        ValueError: The two shapes differ or are not ``[N, D]``.
    """
    if a_ND.ndim != 2 or a_ND.shape != b_ND.shape:
        raise ValueError(f"similarity needs two [N, D] of one shape, got {list(a_ND.shape)} and {list(b_ND.shape)}")
    with torch.autocast(a_ND.device.type, enabled=False):
        a_ND, b_ND = (x.float() / x.float().norm(dim=1, keepdim=True) for x in (a_ND, b_ND))
        return (a_ND * b_ND).sum(dim=1).clamp(-1, 1)
