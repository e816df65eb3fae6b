"""Which action gets which advantage, with several reconstructions of a caption."""

import math
from dataclasses import replace

import pytest
import torch

from uae.rollout import Plan, credit, noise_seeds
from uae.types import Rewards, Sampling

PLAN = Plan(group=3, sampling=Sampling(), train="both", reconstructions=4)


def standardized(values):
    mean = sum(values) / len(values)
    std = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    return [(v - mean) / (std + 1e-4) for v in values]


def test_captions_are_compared_by_their_mean_and_reconstructions_within_their_caption():
    reward = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    rewards, advantage_BG, drawn_R = credit(Rewards(reward, {"clip": reward * 2}), PLAN)
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
    rewards, advantage_BG, drawn_R = credit(Rewards(reward), replace(PLAN, reconstructions=1))
    assert torch.equal(rewards.reward_BG, reward)
    assert torch.equal(drawn_R, advantage_BG.flatten())


def test_a_reconstruction_without_a_reward_leaves_the_caption_the_others():
    reward = torch.tensor([[1.0, math.nan, 3.0, 2.0, 0.0, 0.0, 0.0, 1.0]])
    rewards, _, drawn_R = credit(Rewards(reward), replace(PLAN, group=2))
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
