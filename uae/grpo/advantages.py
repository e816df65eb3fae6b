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
    """Reward minus its group's mean, over a standard deviation.

    NaN means "not scored": it is left out of every mean and std, and its advantage is 0. So is everything in a group
    without a score, and in a group whose rewards are all the same.

    Rows are whole groups, so ``group`` and ``none`` need nothing from other ranks. For ``batch`` the std spans the
    optimiser step: either pass the rewards of all ranks and keep the own rows of the result, or pass ``batch_std``.

    Args:
        reward_BG: Rewards ``[B, G]`` in any unit, G >= 2.
        scale: ``group`` divides by the std of the group, ``batch`` by that of all rewards, ``none`` by nothing.
        eps: Added to the std, in the reward's unit. Group stds near it shrink the advantage.
        std_correction: 1 for the unbiased (Bessel) std, 0 for the population std.
        batch_std: Std of the rewards of all ranks, for ``scale="batch"`` only.

    Returns:
        ``advantage_BG``, detached, in the rewards' dtype (float32 for integers).

    Raises:
        ValueError: G < 2, an unknown scale or correction, or a ``batch_std`` without ``scale="batch"``.
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
    """Share of groups that teach nothing, because their rewards have (almost) no spread.

    Args:
        reward_BG: Rewards ``[B, G]``; NaN is left out, and a group without a score counts as one without spread.
        tolerance: Largest population std that counts as none, in the reward's unit.

    Returns:
        float32 scalar in [0, 1].
    """
    std_B1 = _std(*_deviations(reward_BG), correction=0)
    return (std_B1 <= tolerance).float().mean()


def _deviations(reward_BG: Tensor) -> tuple[Tensor, Tensor]:
    """Distance to the group's mean (0 where NaN) and which entries are scored.

    In float64, where a sum of equal float32 numbers is exact: identical rewards give exactly 0, not rounding noise
    that a small std would blow up.
    """
    reward_BG = reward_BG.detach().double()
    scored_BG = ~reward_BG.isnan()
    mean_B1 = reward_BG.nansum(1, keepdim=True) / scored_BG.sum(1, keepdim=True).clamp(min=1)
    return (reward_BG - mean_B1).masked_fill(~scored_BG, 0.0), scored_BG


def _std(deviation_BG: Tensor, scored_BG: Tensor, correction: int) -> Tensor:
    """Std ``[B, 1]`` of the scored entries; 0 where there are too few of them."""
    freedom = (scored_BG.sum(1, keepdim=True) - correction).clamp(min=1)
    return (deviation_BG.square().sum(1, keepdim=True) / freedom).sqrt()


def _check(reward_BG: Tensor, scale: str, std_correction: int, batch_std: Tensor | float | None) -> None:
    if reward_BG.dim() != 2 or reward_BG.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {list(reward_BG.shape)}; allowed: [B, G] with G >= 2, because an advantage compares "
            "the captions of one image: raise model.group"
        )
    if scale not in get_args(Scale):
        raise ValueError(f"scale={scale!r}; allowed: {', '.join(get_args(Scale))}")
    if std_correction not in (0, 1):
        raise ValueError(f"std_correction={std_correction}; allowed: 1 (unbiased) or 0 (population)")
    if batch_std is not None and scale != "batch":
        raise ValueError(f"batch_std was given with scale={scale!r}, which ignores it; allowed with scale='batch' only")
