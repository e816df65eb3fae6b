import math
import warnings

import pytest
import torch

from callbacks.health import Health, total_norm
from uae.data import SceneData
from uae.rewards import BaseReward, WeightedReward


class Scripted(BaseReward):
    """Rewards that a test names, one row of G per image."""

    def __init__(self, rows):
        self.rows = rows

    def __call__(self, sources_BCHW, reconstructions_NCHW, texts):
        return torch.tensor([self.rows[b % len(self.rows)] for b in range(len(sources_BCHW))], dtype=torch.float32)


def scripted(*rows):
    return WeightedReward({"scripted": Scripted(rows)}, {"scripted": 1.0})


def fit(trainer, module, steps=1, patience=10):
    run = trainer(callbacks=[Health(patience)], max_steps=steps)
    run.fit(module, SceneData(batch_size=2, train_size=64))
    return run


def weights(module):
    return {name: p.detach().clone() for name, p in module.policy.named_parameters()}


@pytest.mark.parametrize("kind", ["loss", "gradient", "reward"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_it_stops_before_the_weights_change_and_names_step_and_key(build, trainer, kind, value):
    module = build(reward=scripted([value] * 3)) if kind == "reward" else build(reward=scripted([0.0, 0.5, 1.0]))
    step = module.training_step

    def broken_step(batch, batch_idx):
        loss = step(batch, batch_idx)
        if module.global_step == 2 and kind == "loss":
            return loss * value
        if module.global_step == 2 and kind == "gradient":
            next(p for p in module.policy.parameters() if p.requires_grad).register_hook(lambda g: g + value)
        if module.global_step == 2:
            module.before = weights(module)
        return loss

    module.training_step = broken_step
    expected = {"loss": "loss", "gradient": "gradient", "reward": "reward"}[kind]
    with pytest.raises(FloatingPointError, match=expected) as stop:
        fit(trainer, module, steps=4)
    assert f"at step {0 if kind == 'reward' else 2}" in str(stop.value)
    assert ("optimizer.init_args.lr" if kind != "reward" else "model.init_args.reward") in str(stop.value)
    if kind == "gradient":
        assert all(torch.equal(p, module.before[name]) for name, p in module.policy.named_parameters())


def test_single_missing_rewards_are_no_reason(build, trainer):
    assert fit(trainer, build(reward=scripted([0.0, math.nan, 1.0], [math.nan] * 3))).global_step == 1


@pytest.mark.parametrize(("rows", "warned"), [([[0.5] * 3], True), ([[0.5] * 3, [0.0, 0.5, math.nan]], False)])
def test_it_warns_when_no_group_says_anything(build, trainer, rows, warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(trainer, build(reward=scripted(*rows)), steps=3, patience=3)
    assert any("sampling.temperature" in str(warning.message) for warning in caught) is warned


def test_norm_of_all_gradients():
    gradients = [torch.tensor([3.0]), torch.tensor([[0.0, 4.0]])]
    assert total_norm(gradients).item() == pytest.approx(5.0)
