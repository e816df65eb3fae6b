"""Group-relative advantages (GRPO: arXiv 2402.03300, section 4.1; without the std: Dr. GRPO, arXiv 2503.20783)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Scale = Literal["group", "batch", "none"]


def group_advantages(
    reward_BG: Tensor,
    scale: Scale = "group",
    eps: float = 1e-4,
    std_correction: int = 1,
    batch_std: Tensor | float | None = None,
) -> Tensor:
    """The advantage of every caption: its reward minus the mean of its group, divided by a standard deviation.

    A reward of NaN means that a caption was not scored. It is left out of every mean and standard deviation, and its
    advantage is 0. The advantage is also 0 if no caption of the group was scored, or if all have the same reward.

    A row is a whole group, so ``group`` and ``none`` need nothing from other processes. For ``batch``, either pass the
    rewards of all processes and keep the rows of your own, or pass ``batch_std``.

    Args:
        reward_BG: Rewards ``[B, G]`` in any unit, G >= 2.
        scale: ``group`` divides by the standard deviation within the group, ``batch`` by that of all rewards (after the
            means of the groups were subtracted), and ``none`` by nothing.
        eps: Number that is added to the standard deviation, in the unit of the rewards. It keeps the advantages small if
            the rewards of a group differ by hardly more than this.
        std_correction: 1 for the unbiased standard deviation (Bessel's correction), 0 for that of the population.
        batch_std: The standard deviation of the rewards of all processes; allowed for ``scale="batch"`` only.

    Returns:
        Advantages ``[B, G]``, detached, in the data type of the rewards (float32 for integers).

    Raises:
        ValueError: G < 2, the scale or the correction is unknown, or ``batch_std`` is given without ``scale="batch"``.
    """
    _check(reward_BG, scale, std_correction, batch_std)
    deviation_BG, scored_BG = _deviations(reward_BG)
    advantage_BG = deviation_BG
    if scale == "group":
        advantage_BG = deviation_BG / (_std(deviation_BG, scored_BG, std_correction) + eps)
    elif scale == "batch":
        if batch_std is None:
            batch_std = _std(*_deviations(reward_BG.reshape(1, -1)), std_correction)
        advantage_BG = deviation_BG / (batch_std + eps)
    advantage_BG = advantage_BG.masked_fill(deviation_BG == 0, 0.0)  # 0 / 0, should eps be 0
    return advantage_BG.to(reward_BG.dtype if reward_BG.is_floating_point() else torch.float32)


def zero_variance_share(reward_BG: Tensor, tolerance: float = 1e-6) -> Tensor:
    """The share of groups that teach nothing, because their rewards hardly differ.

    Args:
        reward_BG: Rewards ``[B, G]``. NaN is left out; a group in which nothing was scored counts as one without spread.
        tolerance: Standard deviation (of the population) up to which a group has no spread, in the unit of the rewards.

    Returns:
        float32 ``[]`` in [0, 1].
    """
    std_B1 = _std(*_deviations(reward_BG), correction=0)
    return (std_B1 <= tolerance).float().mean()


def _deviations(reward_BG: Tensor) -> tuple[Tensor, Tensor]:
    """The differences from the group's mean (0 where NaN), and which entries were scored.

    Computed in float64, where a sum of equal float32 numbers is exact. So equal rewards give exactly 0, and not a rounding
    error that dividing by a small standard deviation would enlarge.
    """
    reward_BG = reward_BG.detach().double()
    scored_BG = ~reward_BG.isnan()
    mean_B1 = reward_BG.nansum(1, keepdim=True) / scored_BG.sum(1, keepdim=True).clamp(min=1)
    return (reward_BG - mean_B1).masked_fill(~scored_BG, 0.0), scored_BG


def _std(deviation_BG: Tensor, scored_BG: Tensor, correction: int) -> Tensor:
    """The standard deviation ``[B, 1]`` of the scored entries; 0 where there are too few of them."""
    freedom = (scored_BG.sum(1, keepdim=True) - correction).clamp(min=1)
    return (deviation_BG.square().sum(1, keepdim=True) / freedom).sqrt()


def _check(reward_BG: Tensor, scale: str, std_correction: int, batch_std: Tensor | float | None) -> None:
    if reward_BG.dim() != 2 or reward_BG.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {list(reward_BG.shape)}; allowed: [B, G] with G >= 2, because an advantage compares "
            "the captions of one image: raise model.init_args.group"
        )
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r}; allowed: {', '.join(get_args(Scale))}")
    if std_correction not in (0, 1):
        raise ValueError(f"std_correction={std_correction}; allowed: 1 (unbiased) or 0 (population)")
    if batch_std is not None and scale != "batch":
        raise ValueError(f"batch_std was given with scale={scale!r}, which ignores it; allowed with scale='batch' only")
