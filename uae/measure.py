"""What is logged about a rollout and about an update. Tags are the stages' names."""

from __future__ import annotations

import torch
from torch import Tensor

from uae.grpo import LossTerms, zero_variance_share
from uae.rollout import Experience

MAXIMA = ("policy/sampler_gap", "policy/ratio_max", "advantage/max_abs")  # over ranks; everything else is a mean


def of_rollout(experience: Experience, max_tokens: int) -> dict[str, Tensor | float]:
    """Scalars of one rollout. ``caption/finished`` is the share of captions that ended before ``max_tokens``."""
    rollout, rewards = experience.rollout, experience.rewards
    length_N = rollout.mask_NT.sum(1)
    reward_BG = rewards.reward_BG
    deviation_BG = reward_BG - reward_BG.nanmean(1, keepdim=True)
    freedom_B = ((~reward_BG.isnan()).sum(1) - 1).clamp(min=1)
    return {
        "caption/length": length_N.mean(),
        "caption/finished": (length_N < max_tokens).float().mean(),
        "reconstruction/brightness": experience.reconstructions_NCHW.mean(),
        "reward/mean": reward_BG.nanmean(),
        "reward/std": (deviation_BG.square().nansum(1) / freedom_B).sqrt().mean(),  # within groups
        "reward/zero_variance": zero_variance_share(reward_BG),
        **{f"reward/{name}": part_BG.nanmean() for name, part_BG in rewards.parts.items()},
        "advantage/std": experience.advantage_BG.std(),
        "advantage/max_abs": experience.advantage_BG.abs().max(),
        "policy/entropy": -masked_mean(rollout.logp_NT, rollout.mask_NT),  # in nats per token, estimated at the samples
        "policy/sampler_gap": experience.sampler_gap,
        **{f"time/{stage}": seconds for stage, seconds in experience.seconds.items()},
    }


def of_update(terms: LossTerms, logp_NT: Tensor, experience: Experience) -> dict[str, Tensor | float]:
    """Scalars of one mini-batch. ``policy/kl`` is in nats per token (k3) whatever the loss aggregates."""
    values: dict[str, Tensor | float] = {
        "policy/loss": terms.loss.detach(),
        "policy/clip_fraction": terms.clip_fraction,
        "policy/ratio_mean": terms.ratio_mean,
        "policy/ratio_max": terms.ratio_max,
    }
    if experience.reference_logp_NT is not None:
        d_NT = experience.reference_logp_NT - logp_NT.detach()
        values["policy/kl"] = masked_mean(d_NT.exp() - d_NT - 1, experience.rollout.mask_NT)
    return values


def over_ranks(values: dict[str, Tensor | float], all_WK: Tensor) -> dict[str, Tensor]:
    """One number per name from every rank's: the largest of a maximum, else the mean of those that are not NaN."""
    columns = zip(values, all_WK.view(-1, len(values)).unbind(1), strict=True)
    return {name: column.max() if name in MAXIMA else column.nanmean() for name, column in columns}


def masked_mean(values_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Mean over unmasked tokens."""
    return torch.where(mask_NT.bool(), values_NT, 0.0).sum() / mask_NT.sum().clamp(min=1)
