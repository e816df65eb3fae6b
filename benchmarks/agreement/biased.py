"""The miniature with a sampler that is wrong on purpose, to see what a correction is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from uae.miniature.tiny import Tiny
from uae.types import UMM, Rollout, Sampling


class Biased(Tiny):
    """Captions are drawn by another policy than the one that learns; their log-probs are reported as they were drawn.

    Args:
        temperature: What the sampler divides logits by, beside the temperature of the policy; 1 is unbiased.
        half: Whether the sampler computes in bfloat16, as another engine would.
    """

    def __init__(self, temperature: float = 1.0, half: bool = False) -> None:
        super().__init__()
        self.temperature, self.half = temperature, half

    def build(self) -> UMM:
        """The miniature, with this sampler where captions are drawn at random; greedy captions are those of the policy."""
        umm = super().build()
        captioner: Any = umm.captioner
        honest = captioner.sample

        def sample(context: Any, group: int, sampling: Sampling, seeds: Any) -> Rollout[Any]:
            if sampling.temperature == 0:
                return honest(context, group, sampling, seeds)
            warm = replace(sampling, temperature=sampling.temperature * self.temperature)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                rollout = honest(context, group, warm, seeds)
            return replace(rollout, temperature=sampling.policy_temperature, context=replace(rollout.context, features=None))

        captioner.sample = sample
        return umm
