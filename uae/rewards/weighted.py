"""Several rewards as one number."""

from __future__ import annotations

import torch
from torch import Tensor

from uae.rewards.base import BaseReward
from uae.types import ImageEncoder, Rewards


class WeightedReward:
    """A weighted sum of named rewards.

    Args:
        parts: The rewards by name. The mean of every part is logged as ``reward/<name>``.
        weights: The weight of every part, under the same names. A part of weight 0 is computed and logged, but adds
            nothing to the sum.

    Raises:
        ValueError: There is no part, or the two dictionaries do not have the same names.
    """

    def __init__(self, parts: dict[str, BaseReward], weights: dict[str, float]) -> None:
        unweighted, unknown = sorted(set(parts) - set(weights)), sorted(set(weights) - set(parts))
        if unweighted or unknown or not parts:
            raise ValueError(
                f"reward parts and weights must name the same rewards, at least one; parts without a weight: {unweighted}, "
                f"weights without a part: {unknown}; set model.init_args.reward.init_args.parts and "
                "model.init_args.reward.init_args.weights"
            )
        self.parts = parts
        self.weights = weights

    @property
    def encoders(self) -> dict[str, ImageEncoder]:
        """The image encoders of all parts. Each has the name of its part, or ``<part>/<encoder>`` if a part has several."""
        return {
            part if len(reward.encoders) == 1 else f"{part}/{name}": encoder
            for part, reward in self.parts.items()
            for name, encoder in reward.encoders.items()
        }

    def load(self, device: torch.device | str = "cpu") -> WeightedReward:
        """Load every part and move it to ``device``; returns the reward itself."""
        for part in self.parts.values():
            part.load(device)
        return self

    def __call__(self, sources_BCHW: Tensor, reconstructions_NCHW: Tensor, texts: list[str]) -> Rewards:
        """Score the reconstructions of one batch; the arguments are those of `BaseReward`.

        Returns:
            The weighted sum ``[B, G]``, and every part without its weight. Where a part of nonzero weight is NaN the sum
            is NaN, too, and `uae.grpo.group_advantages` leaves that reconstruction out.
        """
        parts = {name: part(sources_BCHW, reconstructions_NCHW, texts) for name, part in self.parts.items()}
        total_BG = torch.zeros_like(next(iter(parts.values())), dtype=torch.float32)
        for name, part_BG in parts.items():
            if self.weights[name] != 0:  # 0 * NaN would be NaN
                total_BG = total_BG + self.weights[name] * part_BG
        return Rewards(total_BG, parts, self.weights)
