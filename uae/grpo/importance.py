"""Corrected sampling: weights for actions that were drawn from a policy which is not quite the one that learns.

The sampler and the training code may disagree about a log-prob, because one of them computes in bfloat16, in another order of
operations, or with weights of some steps ago. An expectation under the old policy is one under the sampler with the weights
``exp(old_logp - sampler_logp)`` (importance sampling). Large weights have a large variance, so they are limited: cut off
("truncate": https://fengyao.notion.site/off-policy-rl) or set to zero outside of a range ("mask": IcePop, arXiv 2510.18855).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

Level = Literal["token", "sequence"]
Mode = Literal["truncate", "mask"]


def importance_weights(
    sampler_logp: Tensor,
    old_logp: Tensor,
    mask: Tensor,
    level: Level = "token",
    mode: Mode = "truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> Tensor:
    """Weights ``[N, T]`` that make N rows of T sampled actions stand for the policy whose log-probs training code computes.

    Args:
        sampler_logp: Log-probs ``[N, T]`` in nats, as the sampler computed them when it drew the actions.
        old_logp: Log-probs ``[N, T]`` of the same actions under the weights of the rollout, computed by training code.
        mask: ``[N, T]``, 1 or True where an action counts. Masked positions may hold anything.
        level: ``token`` weighs every action by its own ratio. ``sequence`` weighs all actions of a row by the geometric mean of
            their ratios, so that the weight of a long row has no larger spread than that of a short one. Only ``token`` is the exact
            weight of a single action; the ratio of a whole row would be the product.
        mode: ``truncate`` moves weights outside of the range to its border; ``mask`` sets them to 0.
        low: Lower end of the range, from 0 to 1.
        high: Upper end of the range, 1 or more; infinity sets no limit.

    Returns:
        Weights in float32 or wider, detached; 1 where nothing has to be corrected, and 0 where masked.

    Raises:
        ValueError: The shapes differ, or a setting is outside of its range.
    """
    return Correction(level, mode, low, high)(sampler_logp, old_logp, mask)


@dataclass(frozen=True)
class Correction:
    """Corrects what actions are worth for the gap between sampler and training code, see `importance_weights`.

    Args:
        level: Whether every action has its own weight (``token``), or all actions of a row have one (``sequence``).
        mode: What becomes of weights outside of the range: its border (``truncate``), or 0 (``mask``).
        low: Lower end of the range of weights, from 0 to 1.
        high: Upper end of the range of weights, 1 or more.

    Raises:
        ValueError: A value is outside of its range.
    """

    level: Level = "token"
    mode: Mode = "truncate"
    low: float = 0.0
    high: float = 2.0

    def __post_init__(self) -> None:
        """Refuse values outside of their range."""
        for key, name, names in (("level", self.level, Level), ("mode", self.mode, Mode)):
            if name not in get_args(names):
                raise ValueError(f"model.init_args.correction.{key}={name!r}; allowed: {', '.join(get_args(names))}")
        if not 0 <= self.low <= 1 <= self.high:
            raise ValueError(
                f"model.init_args.correction.low={self.low} and model.init_args.correction.high={self.high}; allowed: 0 <= low <= 1 "
                "<= high, because 1 is the weight of an action about which sampler and training code agree"
            )

    def __call__(self, sampler_logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
        """The weights ``[N, T]`` of `importance_weights`."""
        ratio_NT = self.ratios(sampler_logp, old_logp, mask)
        limited_NT = ratio_NT.clamp(self.low, self.high)
        if self.mode == "mask":
            limited_NT = ratio_NT.masked_fill(self._outside(ratio_NT), 0.0)
        return limited_NT.masked_fill(~mask.bool(), 0.0)

    def ratios(self, sampler_logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
        """The weights ``[N, T]`` before they are limited; 1 where masked."""
        if not sampler_logp.shape == old_logp.shape == mask.shape:
            raise ValueError(
                f"sampler_logp, old_logp and mask have shapes {list(sampler_logp.shape)}, {list(old_logp.shape)} and "
                f"{list(mask.shape)}; allowed: one shape [N, T]"
            )
        valid_NT = mask.bool()
        dtype = torch.promote_types(old_logp.dtype, torch.float32)
        gap_NT = (old_logp.detach().to(dtype) - sampler_logp.detach().to(dtype)).masked_fill(~valid_NT, 0.0)
        if self.level == "sequence":
            gap_NT = (gap_NT.sum(1, keepdim=True) / valid_NT.sum(1, keepdim=True).clamp(min=1)).expand_as(gap_NT)
        return gap_NT.exp()

    def limited(self, sampler_logp: Tensor, old_logp: Tensor, mask: Tensor) -> Tensor:
        """The share ``[]`` of the unmasked actions whose weight was outside of the range."""
        valid_NT = mask.bool()
        outside_NT = self._outside(self.ratios(sampler_logp, old_logp, mask)) & valid_NT
        return outside_NT.sum() / valid_NT.sum().clamp(min=1)

    def _outside(self, ratio_NT: Tensor) -> Tensor:
        return (ratio_NT < self.low) | (ratio_NT > self.high)


def effective_sample_size(weights: Tensor, mask: Tensor) -> Tensor:
    """The share ``[]`` of the unmasked actions that the weights leave in effect: ``(sum w)^2 / (n sum w^2)``, in [0, 1].

    1 if all weights are equal; 1/n if one of n actions has all the weight (Kong, 1992).
    """
    weight = weights.masked_fill(~mask.bool(), 0.0)
    return weight.sum().square() / (mask.bool().sum() * weight.square().sum()).clamp(min=1e-12)
