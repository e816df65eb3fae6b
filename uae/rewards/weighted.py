"""Several rewards as one number."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uae.rewards.base import BaseReward
from uae.types import Rewards


class WeightedReward:
    """A weighted sum of named rewards.

    Args:
        parts: Name to reward. The names become the tags ``reward/<name>``.
        weights: Name to weight. A part of weight 0 is computed and logged, not rewarded.
    """

    def __init__(self, parts: dict[str, BaseReward], weights: dict[str, float]) -> None:
        unweighted, unknown = sorted(set(parts) - set(weights)), sorted(set(weights) - set(parts))
        if unweighted or unknown or not parts:
            raise ValueError(
                f"reward parts and weights must name the same rewards, at least one; parts without a weight: "
                f"{unweighted}, weights without a part: {unknown}; set reward.parts and reward.weights"
            )
        self.parts = parts
        self.weights = weights

    def load(self, device: Any = "cpu") -> WeightedReward:
        """Load every part; returns itself."""
        for part in self.parts.values():
            part.load(device)
        return self

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Rewards:
        """The weighted sum ``[B, G]`` and every part unweighted.

        A NaN in a part counts as missing: the sum is NaN there, and advantages leave the row out. Parts of weight 0
        cannot spoil the sum.
        """
        parts = {name: part(sources_BCHW, reconstructions_NCHW, texts) for name, part in self.parts.items()}
        total_BG = torch.zeros_like(next(iter(parts.values())), dtype=torch.float32)
        for name, part_BG in parts.items():
            if self.weights[name] != 0:  # 0 * NaN would be NaN
                total_BG = total_BG + self.weights[name] * part_BG
        return Rewards(total_BG, parts)
