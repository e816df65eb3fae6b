"""The scalars that are logged about a rollout and about an update. A tag begins with the stage it is about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from uae.grpo import Correction, LossTerms, effective_sample_size, zero_variance_share
from uae.rollout import Experience, Segment
from uae.types import Actions

POLICIES = {"caption": "policy", "image": "image_policy"}  # from a segment to the first part of its tags
# For these tags the largest value of all ranks is logged, for all others the mean over ranks.
MAXIMA = (
    "policy/sampler_gap", "image_policy/sampler_gap", "policy/ratio_max", "image_policy/ratio_max", "advantage/max_abs",
)  # fmt: skip


def of_rollout(experience: Experience, max_tokens: int) -> dict[str, Tensor | float]:
    """Scalars of one rollout. ``caption/finished`` is the share of captions that ended before ``max_tokens``."""
    rollout, rewards = experience.rollout, experience.rewards
    length_N = rollout.mask_RS.sum(1)
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
        **_of_filtering(experience),
        **{f"reward/{name}": part_BG.nanmean() for name, part_BG in rewards.parts.items()},
        "advantage/std": experience.advantage_BG.std(),
        "advantage/max_abs": experience.advantage_BG.abs().max(),
        **{f"time/{stage}": seconds for stage, seconds in experience.seconds.items()},
        "speed/tokens_per_second": length_N.sum() / max(experience.seconds["caption"], 1e-9),
        "speed/images_per_second": len(experience.reconstructions_NCHW) / max(experience.seconds["render"], 1e-9),
        **_of_actions("policy", rollout),
        **_of_images(experience),
    }


def _of_filtering(experience: Experience) -> dict[str, Tensor | float]:
    """Shares of what `uae.groups.Filtering` did: images that were drawn again, and rows that the loss counts."""
    values: dict[str, Tensor | float] = {"reward/redrawn": experience.redrawn} if experience.redrawn else {}
    for name, segment in experience.segments.items():
        if segment.kept_R is not None:
            values[f"{POLICIES[name]}/kept"] = segment.kept_R.float().mean()
    return values


def _of_actions(policy: str, actions: Actions) -> dict[str, Tensor | float]:
    """Mean entropy of the distributions that actions were drawn from, in nats per action."""
    return {} if actions.entropy_RS is None else {f"{policy}/entropy": masked_mean(actions.entropy_RS, actions.mask_RS)}


def _of_images(experience: Experience) -> dict[str, Tensor | float]:
    """Log-likelihood, as the sampler saw it, and entropy of the renderer's actions.

    Both are in nats per action (tokens) or per latent dimension (flows).
    """
    image = experience.segments.get("image")
    if image is None:
        return {}
    logp = masked_mean(image.actions.logp_RS, image.actions.mask_RS)
    return {"image_policy/logp": logp, **_of_actions("image_policy", image.actions)}


def of_update(
    name: str, terms: LossTerms, logp_RS: Tensor, segment: Segment[Any], correction: Correction | None = None
) -> dict[str, Tensor | float]:
    """Scalars of one mini-batch and segment.

    ``.../kl`` is the k3 estimate of the KL divergence in nats per action, however the loss aggregates it. For ``.../correction``, see
    `of_correction`.
    """
    policy = POLICIES[name]
    values: dict[str, Tensor | float] = {
        f"{policy}/loss": terms.loss.detach(),
        f"{policy}/clip_fraction": terms.clip_fraction,
        f"{policy}/ratio_mean": terms.ratio_mean,
        f"{policy}/ratio_max": terms.ratio_max,
        f"{policy}/sampler_gap": sampler_gap(segment),
    }
    if segment.reference_logp_RS is not None:
        d_RS = segment.reference_logp_RS - logp_RS.detach()
        values[f"{policy}/kl"] = masked_mean(d_RS.exp() - d_RS - 1, segment.actions.mask_RS)
    if correction is not None:
        values |= {f"{policy}/{tag}": value for tag, value in of_correction(correction, segment).items()}
    return values


def of_correction(correction: Correction, segment: Segment[Any]) -> dict[str, Tensor | float]:
    """What the correction of the sampler's gap did.

    ``correction/effective`` is the effective sample size of the weights as a share of the actions, and ``correction/limited`` the
    share of the actions whose weight was cut off or masked. ``sampler_gap/quarter_1`` to ``quarter_4`` are the means of the absolute
    log-ratio in nats by quarter of the row: a gap that grows along a caption comes from the cache or from positions.
    """
    assert segment.old_logp_RS is not None, "the first pass of the update sets them"
    arguments = segment.actions.logp_RS, segment.old_logp_RS, segment.mask_RS
    values: dict[str, Tensor | float] = {
        "correction/effective": effective_sample_size(correction(*arguments), segment.mask_RS),
        "correction/limited": correction.limited(*arguments),
    }
    mask_RS = segment.actions.mask_RS
    gap_RS = (segment.old_logp_RS - segment.actions.logp_RS).abs()
    quarter_RS = 4 * (mask_RS.cumsum(1) - 1) / mask_RS.sum(1, keepdim=True).clamp(min=1)
    for quarter in range(4):
        inside_RS = mask_RS * ((quarter_RS >= quarter) & (quarter_RS < quarter + 1))
        mean = masked_mean(gap_RS, inside_RS)
        values[f"sampler_gap/quarter_{quarter + 1}"] = torch.where(inside_RS.sum() > 0, mean, torch.nan)
    return values


def check_gap(seen: dict[str, Tensor], tolerance: float) -> None:
    """Refuse a run whose sampler and training code disagree about the policy.

    Raises:
        RuntimeError: A ``.../sampler_gap`` is above the tolerance, or NaN.
    """
    gap = max(float(value) for tag, value in seen.items() if tag.endswith("/sampler_gap"))
    if not gap <= tolerance:
        raise RuntimeError(
            f"the first rollout's policy ratio is off by {gap:.3g}; allowed: model.init_args.ratio_tolerance={tolerance:g}. Sampler "
            "and training code disagree about the policy: other position ids, another processor, dropout, or low precision (bfloat16 "
            "alone may reach 0.1: raise model.init_args.ratio_tolerance only then, and set model.init_args.correction)"
        )


def sampler_gap(segment: Segment[Any]) -> Tensor:
    """Largest |ratio - 1| between the old log-probs, as training code computes them, and what the sampler saw."""
    assert segment.old_logp_RS is not None, "the first pass of the update sets them"
    ratio_RS = (segment.old_logp_RS - segment.actions.logp_RS).exp()
    return (ratio_RS - 1).abs().masked_fill(segment.actions.mask_RS == 0, 0.0).max()


def over_ranks(values: dict[str, Tensor | float], all_WK: Tensor) -> dict[str, Tensor]:
    """Combine the values of all ranks: the largest value for tags in `MAXIMA`, else the mean of those that are not NaN.

    Args:
        values: The values of this rank, by tag.
        all_WK: The values of all W ranks, in the order of the K tags.
    """
    columns = zip(values, all_WK.view(-1, len(values)).unbind(1), strict=True)
    return {name: column.max() if name in MAXIMA else column.nanmean() for name, column in columns}


def masked_mean(values_RS: Tensor, mask_RS: Tensor) -> Tensor:
    """Mean over unmasked actions."""
    return torch.where(mask_RS.bool(), values_RS, 0.0).sum() / mask_RS.sum().clamp(min=1)
