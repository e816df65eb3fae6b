"""Advantages against plain loops, and the properties that a group baseline must have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from uae.grpo import group_advantages, zero_variance_share

from . import reference

NAN = math.nan


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("correction", [0, 1])
@pytest.mark.parametrize("eps", [1e-4, 0.0, 0.5])
def test_matches_loops(scale, correction, eps):
    rewards = [[0.1, 0.7, 0.4, 0.2], [NAN, 0.5, 0.6, NAN], [0.3] * 4, [NAN] * 4, [NAN, NAN, 0.9, NAN], [1, 2, -3, 0.5]]
    expected = reference.advantages(rewards, scale, eps, correction)
    got = group_advantages(torch.tensor(rewards, dtype=torch.float64), scale, eps, correction)
    assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


reward_lists = st.integers(2, 5).flatmap(
    lambda g: st.lists(st.lists(st.floats(-3, 3) | st.just(NAN), min_size=g, max_size=g), min_size=1, max_size=4)
)


@settings(max_examples=80, deadline=None)
@given(reward_lists, st.sampled_from(["group", "batch", "none"]), st.floats(-5, 5), st.randoms())
def test_properties(rewards, scale, shift, random):
    reward_BG = torch.tensor(rewards, dtype=torch.float64)
    advantage_BG = group_advantages(reward_BG, scale)
    assert advantage_BG.isfinite().all()
    assert (advantage_BG[reward_BG.isnan()] == 0).all()
    assert_close(advantage_BG.sum(1), torch.zeros(len(rewards), dtype=torch.float64), atol=1e-8, rtol=0)
    # A constant added to one group is invisible to that group.
    shifted = reward_BG.clone()
    shifted[0] += shift
    if scale != "batch":
        assert_close(group_advantages(shifted, scale), advantage_BG, atol=1e-8, rtol=1e-8)
    # Better reward, larger advantage; the order inside a group follows the permutation of its rewards.
    order = list(range(reward_BG.shape[1]))
    random.shuffle(order)
    assert_close(group_advantages(reward_BG[:, order], scale), advantage_BG[:, order], atol=1e-9, rtol=1e-9)


def test_other_groups_matter_to_batch_scale_only():
    alone = torch.tensor([[0.0, 1.0, 2.0]])
    crowd = torch.cat([alone, torch.tensor([[10.0, 90.0, -50.0]])])
    for scale in ("group", "none"):
        assert_close(group_advantages(crowd, scale)[:1], group_advantages(alone, scale))
    assert group_advantages(crowd, "batch")[:1].abs().max() < 0.1 * group_advantages(alone, "batch").abs().max()


def test_batch_std_from_all_ranks_equals_one_process():
    reward_BG = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    whole = group_advantages(reward_BG, "batch")
    ranks = [group_advantages(part, "batch", batch_std=reward_BG.std()) for part in reward_BG.split(2)]
    assert_close(torch.cat(ranks), whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("eps", [1e-4, 0.0])
def test_identical_rewards_give_exactly_zero(dtype, eps):
    reward_BG = torch.full((3, 7), 0.7312345).to(dtype)  # seven times this is not representable in float32
    for scale in ("group", "batch", "none"):
        advantage_BG = group_advantages(reward_BG, scale, eps)
        assert advantage_BG.dtype == dtype
        assert (advantage_BG.abs() <= (1e-11 if dtype == torch.float64 else 0)).all()


def test_small_spread_of_cosine_rewards_survives_float32():
    reward_BG = 0.83 + 1e-4 * torch.arange(8, dtype=torch.float32).reshape(1, 8)
    assert_close(group_advantages(reward_BG, eps=0.0).std(), torch.tensor(1.0), rtol=1e-3, atol=0)


def test_zero_variance_share_counts_groups():
    rewards = torch.tensor([[0.5, 0.5, 0.5], [0.5, 0.6, 0.5], [NAN, NAN, NAN], [0.2, NAN, 0.2], [0.0, 0.0, NAN]])
    assert zero_variance_share(rewards).item() == pytest.approx(4 / 5)
    assert zero_variance_share(torch.tensor([[1.0, 2.0]])).item() == 0


def test_integers_and_gradients():
    assert_close(group_advantages(torch.tensor([[0, 2]]), "none"), torch.tensor([[-1.0, 1.0]]))
    assert not group_advantages(torch.zeros(1, 2, requires_grad=True)).requires_grad


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((4, 1), {}, r"\[4, 1\].*model\.init_args\.group"),
        ((4,), {}, r"\[4\].*model\.init_args\.group"),
        ((2, 2), {"scale": "global"}, "'global'; allowed: group, batch, none"),
        ((2, 2), {"std_correction": 2}, "std_correction=2"),
        ((2, 2), {"batch_std": 1.0}, "scale='batch' only"),
    ],
)
def test_errors_say_what_is_allowed(shape, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        group_advantages(torch.zeros(shape), **arguments)
    assert "\n" not in str(error.value)
