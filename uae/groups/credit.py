"""Rewards of reconstructions become rewards and advantages of what made them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributed

from uae.grpo import group_advantages
from uae.grpo.advantages import Scale
from uae.types import Rewards

Order = Literal["sum_then_normalize", "normalize_then_sum"]


@dataclass(frozen=True)
class Credit:
    """What the actions of one rollout are worth.

    Args:
        rewards: Rewards ``[B, G]`` of captions, which are means over their M reconstructions, with their parts.
        advantage_BG: Advantages of captions.
        drawn_advantage_R: Advantages of the N*M reconstructions.
    """

    rewards: Rewards
    advantage_BG: Tensor
    drawn_advantage_R: Tensor

    def flat(self, train: Literal["captions", "images", "both"]) -> Tensor:
        """Whether an image teaches nothing, because all advantages of what trains are 0; bool ``[B]``."""
        captions_B, drawn_B = (
            (each.view(len(self.advantage_BG), -1) == 0).all(1) for each in (self.advantage_BG, self.drawn_advantage_R)
        )
        return captions_B if train == "captions" else drawn_B if train == "images" else captions_B & drawn_B


def credit(each: Rewards, reconstructions: int, scale: Scale = "group", order: Order = "sum_then_normalize") -> Credit:
    """Compare what was drawn.

    A caption is compared with the other captions of its image, by the mean over its reconstructions. A reconstruction is
    compared with the others of its caption; where there is one only, it shares its caption's advantage.

    Args:
        each: Rewards ``[B, G*M]`` of all reconstructions.
        reconstructions: M, the number of reconstructions of a caption.
        scale: What centred rewards are divided by, see `uae.grpo.group_advantages`.
        order: See `compare`.
    """
    images = len(each.reward_BG)
    rewards = Rewards(
        each.reward_BG.view(images, -1, reconstructions).nanmean(2),
        {name: part.view(images, -1, reconstructions).nanmean(2) for name, part in each.parts.items()},
        each.weights,
    )
    advantage_BG = compare(rewards, scale, order)
    if reconstructions == 1:
        return Credit(rewards, advantage_BG, advantage_BG.flatten())
    parts = {name: part.view(-1, reconstructions) for name, part in each.parts.items()}
    drawn = Rewards(each.reward_BG.view(-1, reconstructions), parts, each.weights)
    return Credit(rewards, advantage_BG, compare(drawn, scale, order).flatten())


def compare(rewards: Rewards, scale: Scale, order: Order) -> Tensor:
    """Advantages, in the shape ``[B, G]`` of the rewards.

    Args:
        rewards: Rewards of the rows that are compared with each other, group by group.
        scale: What centred rewards are divided by. The std of ``batch`` spans the rollouts of all ranks, which hold equally many
            images.
        order: ``sum_then_normalize`` compares the weighted sums of the parts. ``normalize_then_sum`` compares every part by itself,
            centred and divided by its std within the group, adds these up by their weights, and divides by the std of the sums in the
            batch of all ranks (GDPO, arXiv 2601.05242). Then a part counts as its weight says, and not as its spread does, and
            captions with other merits do not get equal advantages because their sums are equal.
    """
    if order == "sum_then_normalize":
        return _over_ranks(rewards.reward_BG, scale)
    total_BG = torch.zeros_like(rewards.reward_BG)
    for name, part_BG in rewards.parts.items():
        if rewards.weights[name] != 0:
            total_BG = total_BG + rewards.weights[name] * group_advantages(part_BG, "group")
    return _over_ranks(total_BG.masked_fill(rewards.reward_BG.isnan(), torch.nan), "batch")


def _over_ranks(reward_BG: Tensor, scale: Scale) -> Tensor:
    if scale != "batch" or not distributed.is_initialized():
        return group_advantages(reward_BG, scale)
    everyone = [torch.empty_like(reward_BG) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, reward_BG.contiguous())
    return group_advantages(torch.cat(everyone), scale).chunk(len(everyone))[distributed.get_rank()]
