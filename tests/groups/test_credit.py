"""Which action gets which advantage, with several reconstructions of a caption."""

import math
from dataclasses import replace

import pytest
import torch

from uae.groups import credit
from uae.rewards import BaseReward, WeightedReward
from uae.rollout import Plan, noise_seeds
from uae.types import Rewards, Sampling

PLAN = Plan(group=3, sampling=Sampling(), train="both", reconstructions=4)


def astuple(worth):
    return worth.rewards, worth.advantage_BG, worth.drawn_advantage_R


def standardized(values):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (std + 1e-4) for v in values]


def test_captions_are_compared_by_their_mean_and_reconstructions_within_their_caption():
    reward = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    rewards, advantage_BG, drawn_R = astuple(credit(Rewards(reward, {"clip": reward * 2}), 4))
    for b in range(2):
        groups = [reward[b, 4 * g : 4 * g + 4].tolist() for g in range(3)]
        means = [sum(group) / 4 for group in groups]
        assert rewards.reward_BG[b].tolist() == pytest.approx(means)
        assert rewards.parts["clip"][b].tolist() == pytest.approx([2 * mean for mean in means])
        assert advantage_BG[b].tolist() == pytest.approx(standardized(means), rel=1e-3)
        for g, group in enumerate(groups):
            start = 12 * b + 4 * g
            assert drawn_R[start : start + 4].tolist() == pytest.approx(standardized(group), rel=1e-3)


def test_a_single_reconstruction_shares_its_captions_advantage():
    reward = torch.rand(2, 3, generator=torch.Generator().manual_seed(0))
    rewards, advantage_BG, drawn_R = astuple(credit(Rewards(reward), 1))
    assert torch.equal(rewards.reward_BG, reward)
    assert torch.equal(drawn_R, advantage_BG.flatten())


def test_a_reconstruction_without_a_reward_leaves_the_caption_the_others():
    reward = torch.tensor([[1.0, math.nan, 3.0, 2.0, 0.0, 0.0, 0.0, 1.0]])
    rewards, _, drawn_R = astuple(credit(Rewards(reward), 4))
    assert rewards.reward_BG.tolist() == [[2.0, 0.25]]
    assert drawn_R[1] == 0


@pytest.mark.parametrize(
    ("train", "shared", "M", "distinct"),
    [
        ("captions", True, 1, 2),  # one noise per image
        ("captions", True, 4, 8),  # the m-th reconstructions of a group share theirs
        ("captions", False, 1, 6),
        ("captions", False, 4, 24),
        ("both", True, 4, 8),  # reconstructions are compared within their caption, where noise is independent
        ("images", True, 1, 6),  # compared across captions: common noise would bias the gradient
        ("both", True, 1, 6),
    ],
)
def test_noise_is_shared_where_no_compared_actions_depend_on_it(train, shared, M, distinct):
    plan = replace(PLAN, train=train, shared_noise=shared, reconstructions=M)
    seeds = noise_seeds(plan, [11, 12], step=3)
    assert len(seeds) == 2 * 3 * M
    assert len(set(seeds)) == distinct
    first = noise_seeds(replace(plan, reconstructions=1, train="captions"), [11, 12], step=3)
    if train == "captions":
        assert seeds[::M] == first  # more reconstructions leave the first as it was


def test_parts_are_compared_by_themselves():
    """GDPO by plain loops: every part standardised within its group, weighted, added, and divided by the std of the batch."""
    generator = torch.Generator().manual_seed(1)
    parts = {"clip": torch.rand(3, 4, generator=generator), "length": 50 * torch.rand(3, 4, generator=generator)}
    parts["length"][2] = 7.0  # says nothing about this group
    parts["seen"] = 1e3 * torch.rand(3, 4, generator=generator)
    weights = {"clip": 1.0, "length": 0.25, "seen": 0.0}
    images = torch.rand(3, 3, 2, 2), torch.rand(12, 3, 2, 2), [""] * 12
    reward = WeightedReward({name: Given(part) for name, part in parts.items()}, weights)(*images)
    sums = []
    for b in range(3):
        clip = standardized(parts["clip"][b].tolist())
        length = standardized(parts["length"][b].tolist()) if b != 2 else [0.0] * 4
        sums.append([one + 0.25 * other for one, other in zip(clip, length, strict=True)])
    every = [value for group in sums for value in group]
    std = math.sqrt(sum(value**2 for value in every) / (len(every) - 1))
    worth = credit(reward, 1, order="normalize_then_sum")
    for b in range(3):
        assert worth.advantage_BG[b].tolist() == pytest.approx([value / (std + 1e-4) for value in sums[b]], rel=1e-3)
    together = credit(reward, 1).advantage_BG
    assert (together[0] - torch.tensor(standardized(parts["length"][0].tolist()))).abs().max() < 0.2  # the wide part wins there


class Given(BaseReward):
    """A reward that is known beforehand."""

    def __init__(self, reward_BG):
        self.reward_BG = reward_BG

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        return self.reward_BG


def test_parts_without_a_score_leave_the_row_out():
    parts = {"a": torch.tensor([[1.0, math.nan, 3.0]]), "b": torch.tensor([[1.0, 5.0, 2.0]])}
    reward = WeightedReward({name: Given(part) for name, part in parts.items()}, {"a": 1.0, "b": 1.0})(
        torch.rand(1, 3, 2, 2), torch.rand(3, 3, 2, 2), [""] * 3
    )
    advantage = credit(reward, 1, order="normalize_then_sum").advantage_BG[0].tolist()
    assert advantage[1] == 0
    assert advantage[0] == pytest.approx(-advantage[2], rel=1e-3)


def test_reconstructions_are_compared_part_by_part_within_their_caption():
    generator = torch.Generator().manual_seed(2)
    parts = {"clip": torch.rand(2, 6, generator=generator), "far": 9 * torch.rand(2, 6, generator=generator)}
    reward = Rewards(parts["clip"] + parts["far"], parts, {"clip": 1.0, "far": 1.0})
    worth = credit(reward, 3, order="normalize_then_sum")
    each = [
        [sum(pair) for pair in zip(*(standardized(part.view(4, 3)[n].tolist()) for part in parts.values()), strict=True)]
        for n in range(4)
    ]
    every = [value for group in each for value in group]
    std = math.sqrt(sum(value**2 for value in every) / (len(every) - 1))
    assert worth.drawn_advantage_R.tolist() == pytest.approx([value / (std + 1e-4) for value in every], rel=1e-3)


def test_two_ways_to_scale_are_refused():
    with pytest.raises(ValueError, match=r"advantage_scale=batch with model\.init_args\.advantage_order=normalize_then_sum"):
        replace(PLAN, advantage_scale="batch", advantage_order="normalize_then_sum")
