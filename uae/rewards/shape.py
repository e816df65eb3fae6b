"""Rows to groups."""

from __future__ import annotations

from torch import Tensor


def batch_and_group(sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> tuple[int, int]:
    """``(B, G)`` of one rollout.

    Raises:
        ValueError: N is not B * G with G >= 1, or there is not one text per reconstruction.
    """
    images, rows = len(sources_BCHW), len(reconstructions_NCHW)
    if not images or not rows or rows % images or len(texts) != rows:
        raise ValueError(
            f"a reward needs B sources, N = B*G reconstructions and N texts, got {images}, {rows} and {len(texts)}"
        )
    return images, rows // images
