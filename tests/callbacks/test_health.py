import math
import warnings
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from callbacks.health import Health
from uae.cli import mistake
from uae.grpo import GRPOLoss
from uae.miniature.data import SceneData
from uae.rewards import BaseReward, WeightedReward

ADAMW = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)


class Scripted(BaseReward):
    """Rewards that a test names, one row of G per image; ``broken`` in place of them at some rollouts."""

    def __init__(self, rows, broken=None, rollouts=()):
        self.rows, self.broken, self.rollouts, self.calls = rows, broken, rollouts, 0

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        rows = [self.rows[b % len(self.rows)] for b in range(len(sources_BCHW))]
        reward_BG = torch.tensor(rows, dtype=torch.float32)
        if self.calls in self.rollouts:
            reward_BG[:] = self.broken
        self.calls += 1
        return reward_BG


def scripted(*rows, **broken):
    return WeightedReward({"scripted": Scripted(rows, **broken)}, {"scripted": 1.0})


SPREAD = [0.0, 0.5, 1.0]


def fit(trainer, module, health=None, steps=1, **options):
    run = trainer(callbacks=[health or Health()], max_steps=steps, **options)
    run.fit(module, SceneData(batch_size=2, train_size=64))
    return run


def state(module, run):
    """Weights and what the optimizer knows."""
    held = run.optimizers[0].state_dict()["state"] if run.optimizers else {}
    return {name: p.detach().clone() for name, p in module.policy.named_parameters()}, held


def breaking(module, kind, value, steps):
    """The module, whose loss or gradient is ``value`` at some steps."""
    step = module.training_step

    def training_step(batch, batch_idx):
        loss = step(batch, batch_idx)
        if module.global_step not in steps:
            return loss
        if kind == "loss":
            return loss * value
        weight = next(p for p in module.policy.parameters() if p.requires_grad)
        handle = weight.register_hook(lambda gradient: (handle.remove(), gradient + value)[1])
        return loss

    module.training_step = training_step
    return module


@pytest.mark.parametrize("kind", ["loss", "gradient", "reward"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_update_leaves_weights_moments_and_counts_alone(build, trainer, kind, value):
    """Adam: after good steps, a skipped one changes nothing that a gradient of zero would change."""
    broken = {"broken": value, "rollouts": (2,)} if kind == "reward" else {}
    health, before = Health(), {}
    module = build(reward=scripted(SPREAD, **broken), optimizer=ADAMW, mini_batches=2)
    module = module if kind == "reward" else breaking(module, kind, value, (2,))
    take, states = module.optimizer_step, []

    def optimizer_step(*arguments, **named):
        before.update(zip(("weights", "moments"), state(module, module.trainer), strict=True))
        take(*arguments, **named)
        after = state(module, module.trainer)
        states.append(all(torch.equal(after[0][name], weight) for name, weight in before["weights"].items()))

    module.optimizer_step = optimizer_step
    with pytest.warns(UserWarning, match=f"{kind}.* at step .*skipped on all ranks .*; .*model.init_args"):
        run = fit(trainer, module, health, steps=4, accumulate_grad_batches=2, gradient_clip_val=0.5)
    assert states == [False, False, True, False]  # two mini-batches, one update per rollout
    assert {int(one["step"]) for one in state(module, run)[1].values()} == {3}
    assert health.skipped == run.callback_metrics["health/skipped_updates"] == 1
    assert health.in_a_row == 0
    assert all(weight.isfinite().all() for weight in state(module, run)[0].values())


@pytest.mark.filterwarnings("ignore:the loss was not finite")
def test_it_stops_after_so_many_in_a_row_and_says_so_in_one_line(build, trainer):
    module = breaking(build(reward=scripted(SPREAD)), "loss", math.nan, (1, 3, 4, 5, 6))
    with pytest.raises(FloatingPointError) as stop:
        fit(trainer, module, Health(max_skipped=3), steps=9)
    line = mistake(stop.value)
    assert line.startswith("the loss was not finite at step 5: 3 updates in a row were skipped (4 in all)")
    assert "max_skipped=3" in line
    assert "optimizer.init_args.lr" in line


def test_single_missing_rewards_are_no_reason(build, trainer):
    health = Health()
    fit(trainer, build(reward=scripted([0.0, math.nan, 1.0], [math.nan] * 3)), health)
    assert health.skipped == 0


def heard(work):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    return [str(warning.message) for warning in caught if "model.init_args" in str(warning.message)]


@pytest.mark.parametrize(("rows", "warned"), [([[0.5] * 3], True), ([[0.5] * 3, [0.0, 0.5, math.nan]], False)])
def test_it_warns_when_no_group_says_anything(build, trainer, rows, warned):
    messages = heard(lambda: fit(trainer, build(reward=scripted(*rows)), Health(3), steps=3))
    assert any("reward/zero_variance=1 " in message for message in messages) is warned


def test_signs_stop_where_asked_with_what_was_seen(build, trainer):
    loss = GRPOLoss(beta=1e-3)
    module = build(reward=scripted(SPREAD), loss=loss, num_iterations=2, optimizer=partial(torch.optim.SGD, lr=0.1))
    health = Health(2, max_kl=1e-6, stop_on=["kl"])
    with pytest.raises(RuntimeError, match=r"policy/kl=.* is above max_kl=1e-06, 2 rollouts in a row") as stop:
        fit(trainer, module, health, steps=20)
    assert module.global_step == 4  # at the end of the second rollout
    assert "model.init_args.loss.beta" in mistake(stop.value)


# ---------------------------------------------------------------------------------------------- signs, by their numbers


class Course:
    """A run that a test tells: metrics per rollout or validation."""

    def __init__(self, health, **attributes):
        self.health, self.module = health, SimpleNamespace(**{"ratio_tolerance": 1e-3, **attributes})
        self.trainer = SimpleNamespace(global_step=0, callback_metrics={})

    def rollouts(self, **metrics):
        """Metrics by tag, with __ for /; one number per rollout."""
        courses = {tag.replace("__", "/"): values for tag, values in metrics.items()}
        for values in zip(*courses.values(), strict=True):
            self.trainer.callback_metrics |= {tag: torch.tensor(v) for tag, v in zip(courses, values, strict=True)}
            self.health.on_train_batch_end(self.trainer, self.module, None, None, 0)
            self.trainer.global_step += 1

    def validations(self, *scores):
        for reward, held_out in scores:
            metrics = {"val_reward/mean": torch.tensor(reward), "unified_score/held_out": torch.tensor(held_out)}
            self.trainer.callback_metrics |= metrics
            self.health.on_validation_end(self.trainer, self.module)
            self.trainer.global_step += 10


@pytest.mark.parametrize(("key", "tag", "good", "bad"), [
    ({"max_kl": 0.5}, "policy__kl", 0.5, 0.51),
    ({"max_kl": 0.5}, "image_policy__kl", 0.5, 0.51),
    ({"max_ratio": 8.0}, "policy__ratio_max", 8.0, 8.1),
    ({}, "policy__sampler_gap", 0.9e-3, 1.1e-3),
    ({"max_zero_variance": 0.75}, "reward__zero_variance", 0.7, 0.75),
    ({"min_entropy": 0.5}, "policy__entropy", 0.51, 0.49),
])  # fmt: skip
def test_a_sign_has_to_last_and_is_told_once(key, tag, good, bad):
    def course(*values):
        start = [1.0, 1.0, 1.0] if tag == "policy__entropy" else [good] * 3  # the first rollouts' entropy is 1
        return heard(lambda: Course(Health(3, **key)).rollouts(**{tag: [*start, *values]}))

    assert course(bad, bad, good, bad, bad) == []
    told = course(bad, bad, bad, bad, bad)
    assert len(told) == 1
    assert f"step 5: {tag.replace('__', '/')}={bad:.3g} " in told[0]
    assert len(course(bad, bad, bad, good, bad, bad, bad)) == 2
    off = dict.fromkeys(key)
    assert not off or heard(lambda: Course(Health(3, **off)).rollouts(**{tag: [1.0] * 3 + [bad] * 5})) == []


def test_the_start_is_remembered_across_a_resume():
    first, second = Health(2, min_entropy=0.5), Health(2, min_entropy=0.5)
    Course(first).rollouts(policy__entropy=[4.0, 2.0, 1.0])
    second.load_state_dict(first.state_dict())
    told = heard(lambda: Course(second).rollouts(policy__entropy=[1.4, 1.4]))
    assert len(told) == 1
    assert "min_entropy=0.5 of the first rollouts' 3" in told[0]


@pytest.mark.parametrize(("scores", "warned"), [
    ([(0.5, 0.5), (0.6, 0.6), (0.7, 0.55)], True),  # against the best, not the first
    ([(0.5, 0.5), (0.6, 0.49)], False),  # within the noise
    ([(0.5, 0.5), (0.4, 0.4)], False),  # both fall: no hacking
    ([(0.5, 0.5), (0.6, 0.6), (0.7, 0.7)], False),
    ([(0.5, math.nan), (0.6, 0.6), (math.nan, 0.1)], False),
])  # fmt: skip
def test_a_reward_that_rises_while_held_out_encoders_fall(scores, warned):
    told = heard(lambda: Course(Health()).validations(*scores))
    assert len(told) == warned
    if warned:
        assert "step 20: since step 10 val_reward/mean rose from 0.600 to 0.700" in told[0]
        assert "fell from 0.600 to 0.550" in told[0]
        with pytest.raises(RuntimeError, match="stop_on=reward_hacking"):
            Course(Health(stop_on=["reward_hacking"])).validations(*scores)
    assert heard(lambda: Course(Health(held_out_fall=None)).validations(*scores)) == []


@pytest.mark.parametrize("wrong", [{"patience": 0}, {"max_skipped": 0}, {"stop_on": ["klx"]}])
def test_bad_settings_name_their_key(wrong):
    with pytest.raises(ValueError, match=f"Health {next(iter(wrong))}=.*; allowed: "):
        Health(**wrong)
