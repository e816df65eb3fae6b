"""Groups that are drawn again, rows that are left out, and weights for a sampler that is off."""

import math
from dataclasses import replace

import pytest
import torch

from tests.conftest import data
from tests.invariants.test_resume import Save, fit, module_of
from tests.invariants.test_splits import Parity
from uae.groups import Credit, Filtering, in_varied_groups
from uae.grpo import Correction, GRPOLoss
from uae.miniature.data import SceneData
from uae.models.flow.policy import Exploration
from uae.rewards import WeightedReward
from uae.rollout import Plan, draw, roll_out, split
from uae.seeds import seed_of
from uae.stopwatch import Stopwatch
from uae.types import Rewards, Sampling

PARITY = WeightedReward({"parity": Parity()}, {"parity": 1.0})
PLAN = Plan(group=2, sampling=Sampling(max_tokens=6), seed=3, filtering=Filtering(rounds=2))


@pytest.fixture(scope="module")
def umm(system):
    return system.build()


@pytest.fixture(scope="module")
def batch():
    return next(iter(SceneData(batch_size=12, train_size=12).train_dataloader()))


def some(batch, images):
    return {"image": batch["image"][images], "id": batch["id"][images]}


def flat(reward_BG):
    return (reward_BG == reward_BG[:, :1]).all(1).nonzero().flatten().tolist()


def test_flat_groups_are_drawn_again_as_if_they_had_been_drawn_alone(umm, batch):
    """Each image has the captions of the first attempt whose rewards differ, and else those of the last."""
    never = roll_out(umm, PARITY, batch, replace(PLAN, filtering=Filtering()), step=4)
    first = flat(never.rewards.reward_BG)
    assert 0 < len(first) < 12
    expected = list(never.rollout.texts)
    waiting = first
    for attempt in (1, 2):
        again = draw(umm, PARITY, some(batch, waiting), replace(PLAN, seed=seed_of(3, "attempt", attempt)), 4, Stopwatch())
        for place, image in enumerate(waiting):
            expected[2 * image : 2 * image + 2] = again.rollout.texts[2 * place : 2 * place + 2]
        waiting = [waiting[place] for place in flat(again.each.reward_BG)]
    experience = roll_out(umm, PARITY, batch, PLAN, step=4)
    assert experience.rollout.texts == expected
    assert flat(experience.rewards.reward_BG) == waiting
    assert len(waiting) < len(first)
    assert experience.redrawn == len(first) / 12
    others = [image for image in range(12) if image not in first]
    assert torch.equal(experience.select(others).reconstructions_NCHW, never.select(others).reconstructions_NCHW)
    # what was drawn again is the policy's own: its log-probs are those of training code, padding included
    segment = experience.segments["caption"]
    gap = (segment.logprobs().detach() - segment.actions.logp_RS).masked_fill(segment.actions.mask_RS == 0, 0.0)
    assert gap.abs().max() < 1e-5
    assert umm.captioner.decode(experience.rollout.tokens_NT, experience.rollout.mask_RS) == expected


def test_a_renderer_that_trains_is_drawn_again_with_its_condition(umm, batch):
    """Trajectories of groups that were drawn again have the log-probs of the policy, under the captions that they show."""
    from uae.models.flow.policy import FlowPolicy

    flow = replace(umm, renderer=FlowPolicy(umm.renderer, Exploration(noise_level=0.7)))
    plan = replace(PLAN, train="images", reconstructions=2)

    class Bright(Parity):
        def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
            bright_N = reconstructions_NCHW.mean((1, 2, 3))
            return (1e6 * bright_N).long().remainder(2).float().view(len(sources_BCHW), -1)

    experience = roll_out(flow, WeightedReward({"bright": Bright()}, {"bright": 1.0}), batch, plan, step=1)
    assert experience.redrawn > 0
    segment = experience.segments["image"]
    assert (segment.logprobs().detach() - segment.actions.logp_RS).abs().max() < 1e-5
    drawn = flow.renderer.pixels(segment.actions)
    torch.testing.assert_close(drawn, experience.reconstructions_NCHW, atol=1e-5, rtol=0)


def test_rounds_end_when_every_group_varies(umm, batch, monkeypatch):
    calls = []
    real = umm.captioner.sample
    monkeypatch.setattr(umm.captioner, "sample", lambda context, *rest: calls.append(len(context)) or real(context, *rest))
    roll_out(umm, PARITY, batch, replace(PLAN, filtering=Filtering(rounds=50)), step=4)
    assert 2 < len(calls) < 50
    assert calls == sorted(calls, reverse=True)


def test_an_image_is_flat_by_what_trains():
    captions, drawn = torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.0, 0.0]]), torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    worth = Credit(Rewards(captions), captions, drawn)
    assert worth.flat("captions").tolist() == [True, False, True]
    assert worth.flat("images").tolist() == [False, True, True]
    assert worth.flat("both").tolist() == [False, False, True]


@pytest.mark.parametrize("filtering", [Filtering(drop_flat_groups=True), Filtering(drop_truncated=True)], ids=["flat", "truncated"])
def test_rows_that_are_left_out_are_left_out_by_rule(umm, batch, filtering):
    experience = roll_out(umm, PARITY, batch, replace(PLAN, filtering=filtering), step=4)
    segment = experience.segments["caption"]
    if filtering.drop_truncated:
        expected = [sum(row) < 6 for row in segment.actions.mask_RS.tolist()]
    else:
        rewards = experience.rewards.reward_BG.tolist()
        expected = [group[0] != group[1] for group in rewards for _ in range(2)]
    assert segment.kept_R.tolist() == expected
    assert len(set(expected)) == 2
    assert segment.mask_RS.sum(1).bool().tolist() == expected
    part = split(experience, 3)[1]["caption"]
    assert part.kept_R.tolist() == expected[8:16]
    assert roll_out(umm, PARITY, batch, replace(PLAN, filtering=Filtering()), step=4).segments["caption"].kept_R is None


def test_groups_of_reconstructions_are_those_of_a_caption():
    advantage_R = torch.tensor([0.0, 0.0, 1.0, -1.0, 0.0, 0.0])
    assert in_varied_groups(advantage_R, 2).tolist() == [False, False, True, True, False, False]
    assert in_varied_groups(advantage_R, 3).tolist() == [True] * 6


def test_a_negative_number_of_rounds_is_refused():
    with pytest.raises(ValueError, match=r"model\.init_args\.filtering\.rounds=-1; allowed: 0"):
        Filtering(rounds=-1)


def test_windows_over_several_rollouts_refuse_to_leave_rows_out(build, trainer):
    module = build(filtering=Filtering(drop_truncated=True), group=2)
    with pytest.raises(ValueError, match=r"filtering leaves captions out.*accumulate_grad_batches to a divisor of 1"):
        trainer(accumulate_grad_batches=2).fit(module, data())


def test_a_resumed_run_draws_the_same_groups_again(build, trainer, tmp_path):
    def module():
        return module_of(build, reward=PARITY, group=2, filtering=Filtering(rounds=2, drop_flat_groups=True))

    straight = fit(module(), trainer, Save(tmp_path, (4,)))
    resumed = fit(module(), trainer, Save(tmp_path), resume=tmp_path / "4.ckpt")
    assert resumed.experience.redrawn == straight.experience.redrawn > 0
    assert resumed.experience.rollout.texts == straight.experience.rollout.texts
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name))


def biased(module, bias):
    """Let the sampler report log-probs that are off by a known amount at every token."""
    real = module.umm.captioner.sample

    def sample(*arguments):
        rollout = real(*arguments)
        return replace(rollout, logp_RS=rollout.logp_RS - bias[: rollout.logp_RS.shape[1]])

    module.umm.captioner.sample = sample


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_run_weighs_its_actions_for_the_samplers_gap(build, trainer, level):
    """One step of a run with a biased sampler moves the weights by the gradient of a loss that is weighted by hand."""
    bias = torch.tensor([0.3, -0.2, 0.9, 0.0, -0.5, 0.1])
    module = build(correction=Correction(level, high=1.5), ratio_tolerance=10.0, group=2, mini_batches=2, num_iterations=2)
    module.configure_model()
    biased(module, bias)
    start = {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}
    run = trainer(max_steps=1)
    run.fit(module, data())
    logged = run.callback_metrics
    segment = module._mini_batches[0]["caption"]
    after = {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}
    for name, parameter in module.policy.named_parameters():
        if name in start:
            parameter.data.copy_(start[name])
    logp_RS, mask_RS = segment.logprobs(), segment.actions.mask_RS
    gap_RS = bias[: mask_RS.shape[1]] * mask_RS
    if level == "sequence":
        gap_RS = gap_RS.sum(1, keepdim=True) / mask_RS.sum(1, keepdim=True) * mask_RS
    weight_RS = gap_RS.exp().clamp(max=1.5)
    each_RS = -weight_RS * segment.advantage_R[:, None] * (logp_RS - logp_RS.detach()).exp() * mask_RS
    loss = (each_RS.sum(1) / mask_RS.sum(1)).mean()
    names = list(start)
    gradients = torch.autograd.grad(loss, [dict(module.policy.named_parameters())[name] for name in names])
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(after[name], start[name] - gradient, atol=1e-6, rtol=0)
    weights = weight_RS[mask_RS.bool()].double()
    effective = (weights.sum() ** 2 / len(weights) / (weights**2).sum()).item()
    assert logged["policy/correction/effective"].item() == pytest.approx(effective, rel=1e-4)
    assert logged["policy/correction/limited"].item() == pytest.approx((gap_RS[mask_RS.bool()].exp() > 1.5).double().mean().item())
    quarters = [logged[f"policy/sampler_gap/quarter_{n}"].item() for n in (1, 2, 3, 4)]
    by_hand = [[] for _ in range(4)]
    for row in mask_RS.tolist():
        length = int(sum(row))
        for t in range(length):
            by_hand[4 * t // length].append(abs(bias[t].item()))
    assert quarters == pytest.approx([sum(q) / len(q) if q else math.nan for q in by_hand], abs=1e-5, nan_ok=True)


def test_entropies_of_a_run_reach_the_loss(build, trainer):
    """An entropy bonus alone moves the weights; nothing else does where all advantages are 0."""

    class Same(Parity):
        def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
            return torch.ones(len(sources_BCHW), len(texts) // len(sources_BCHW))

    flat_reward = WeightedReward({"same": Same()}, {"same": 1.0})
    moved = {}
    for bonus in (0.0, 0.1):
        module = build(loss=GRPOLoss(entropy_bonus=bonus), reward=flat_reward)
        module.configure_model()
        start = {name: p.detach().clone() for name, p in module.policy.named_parameters() if p.requires_grad}
        trainer(max_steps=1).fit(module, data())
        moved[bonus] = max((p - start[name]).abs().max().item() for name, p in module.policy.named_parameters() if name in start)
    assert moved[0.0] == 0
    assert moved[0.1] > 1e-4
