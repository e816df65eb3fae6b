"""What ratios of denoising steps are taken of: oracles are a plain loop, the exact KL divergence, and what is known of Gaussians."""

import math
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.models.flow.flow_cases import SEEDS, STEPS, TEXTS, tiny_renderer
from uae.grpo import GRPOLoss
from uae.models.finetune import Full
from uae.models.flow import sde
from uae.models.flow.policy import Exploration, FlowPolicy

CLOSE = {"atol": 1e-5, "rtol": 0}
EXACT = {"atol": 1e-9, "rtol": 0}
OTHERS = ["centred", "ratio_norm"]
STD_N = torch.tensor([0.7, 0.2, 0.05], dtype=torch.float64)
g = torch.Generator().manual_seed(0)
X, MEAN, OLD = torch.randn(3, 3, 2, 4, generator=g, dtype=torch.float64)


def plain(x, mean, old, std, scaled):
    """Value and gradient of one row, number by number."""
    value, gradient, count = 0.0, [], x.numel()
    for a, m, o in zip(x.flatten().tolist(), mean.flatten().tolist(), old.flatten().tolist(), strict=True):
        weight = std if scaled else 1.0
        value += -((a - o) ** 2) / (2 * std**2) - math.log(std * math.sqrt(2 * math.pi)) + weight * (a - o) * (m - o) / std**2
        gradient.append(weight * (a - o) / std**2 / count)
    return value / count, torch.tensor(gradient, dtype=torch.float64).view_as(x)


def check(module):
    """Of the formula, and of the step that preserves coefficients."""
    for scaled in (False, True):
        mean = MEAN.clone().requires_grad_()
        found_N = module.centred_log_prob(X, mean, OLD, STD_N, scaled)
        found_N.sum().backward()
        for row, std in enumerate(STD_N.tolist()):
            value, gradient = plain(X[row], MEAN[row], OLD[row], std, scaled)
            assert found_N[row].item() == pytest.approx(value, abs=1e-9)
            torch.testing.assert_close(mean.grad[row], gradient, **EXACT)
    mean, std = module.FlowCPS(0.4).moments(X, MEAN, 0.8, 0.5)
    kept, fresh = 0.5 * math.cos(0.2 * math.pi), 0.5 * math.sin(0.2 * math.pi)
    torch.testing.assert_close(mean, 0.5 * (X - 0.8 * MEAN) + kept * (X + 0.2 * MEAN), **EXACT)
    assert std == pytest.approx(fresh)


def test_value_and_gradient_are_those_of_a_plain_loop():
    check(sde)


@pytest.mark.parametrize(
    ("original", "mistake"),
    [
        ("z = (_single(x_next) - old_mean) / std_N1", "z = (_single(x_next) - mean) / std_N1"),
        ("z = (_single(x_next) - old_mean) / std_N1", "z = (old_mean - _single(x_next)) / std_N1"),
        ("(mean - old_mean) / std_N1\n    return", "(old_mean - mean) / std_N1\n    return"),
        ("moved = mean - old_mean if scaled", "moved = mean - old_mean if not scaled"),
        ("return log_prob(x_next, old_mean, std) +", "return log_prob(x_next, mean, std) +"),
        ("image, noise = x - t * velocity, x + (1 - t) * velocity", "noise, image = x - t * velocity, x + (1 - t) * velocity"),
        ("t_next * math.cos(angle) * noise, t_next * math.sin(angle)", "t_next * math.sin(angle) * noise, t_next * math.cos(angle)"),
        ("angle = self.eta * math.pi / 2", "angle = self.eta * math.pi"),
    ],
)
def test_a_planted_mistake_is_red(original, mistake, monkeypatch):
    source = Path(sde.__file__).read_text()
    assert source.count(original) == 1, f"{original!r} must be in sde.py exactly once: update the mutation"
    module = types.ModuleType("mutated_sde")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(source.replace(original, mistake), "<mutated_sde>", "exec"), module.__dict__)
    with pytest.raises(AssertionError):
        check(module)


def test_a_centred_log_prob_is_the_density_plus_the_divergence_from_the_sampler():
    laws = [Normal(mean, STD_N[:, None, None]) for mean in (MEAN, OLD)]
    expected = (laws[0].log_prob(X) + kl_divergence(*laws)).mean((1, 2))
    torch.testing.assert_close(sde.centred_log_prob(X, MEAN, OLD, STD_N), expected, **EXACT)


def test_at_the_samplers_weights_value_and_gradient_are_the_densitys():
    values, gradients = [], []
    for score in (
        lambda mean: sde.log_prob(X, mean, STD_N),
        lambda mean: sde.centred_log_prob(X, mean, OLD, STD_N),
        lambda mean: sde.centred_log_prob(X, mean, OLD, STD_N, scaled=True),
    ):
        mean = OLD.clone().requires_grad_()
        values.append(score(mean))
        gradients.append(torch.autograd.grad(values[-1].sum(), mean)[0])
    torch.testing.assert_close(values[1], values[0], **EXACT)
    torch.testing.assert_close(values[2], values[0], **EXACT)
    torch.testing.assert_close(gradients[1], gradients[0], **EXACT)
    torch.testing.assert_close(gradients[2], gradients[0] * STD_N[:, None, None], **EXACT)


@pytest.mark.parametrize("std", [0.5, 0.05])
def test_the_mean_of_the_log_ratio_is_known(std):
    """0 if centred, and minus the KL divergence if not; RatioNorm's spread does not depend on the noise."""
    rows, dimensions, distance = 20000, 16, 0.02
    old = torch.zeros(rows, dimensions, dtype=torch.float64)
    x = old + std * torch.randn(old.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mean = old + distance
    density = sde.log_prob(x, mean, std) - sde.log_prob(x, old, std)
    centred = sde.centred_log_prob(x, mean, old, std) - sde.log_prob(x, old, std)
    scaled = sde.centred_log_prob(x, mean, old, std, scaled=True) - sde.log_prob(x, old, std)
    spread = distance / std / dimensions**0.5
    allowed = 4 * spread / rows**0.5
    assert centred.mean().item() == pytest.approx(0, abs=allowed)
    assert density.mean().item() == pytest.approx(-((distance / std) ** 2) / 2, abs=allowed)
    assert centred.std().item() == pytest.approx(spread, rel=0.03)
    assert scaled.std().item() == pytest.approx(distance / dimensions**0.5, rel=0.03)


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_the_gradient_of_the_kl_term_is_on_average_that_of_densities(kl):
    """On-policy, over pairs of opposite noise. For k3 as far as the log-ratio is small."""
    std, count = 0.5, 5000
    noise = torch.randn(count, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    old = torch.full((2 * count, 4), 0.3, dtype=torch.float64)
    x, reference = old + std * torch.cat([noise, -noise]), old + 0.01
    gradients = []
    for score in (sde.log_prob, lambda x, mean, std: sde.centred_log_prob(x, mean, old, std)):
        mean = old.clone().requires_grad_()
        term = GRPOLoss(kl=kl).divergence((score(x, reference, std) - score(x, mean, std))[:, None])
        gradients.append(torch.autograd.grad(term.sum(), mean)[0].mean(0))
    torch.testing.assert_close(gradients[1], gradients[0], atol=0, rtol=1e-9 if kl == "k2" else 1e-2)
    expected = -(0.01 / std**2) / 16  # of the KL divergence per dimension, once more divided by the dimensions
    torch.testing.assert_close(gradients[1].mean().item(), expected, atol=0, rtol=0.05)


# --------------------------------------------------------------------------------------------------------- the policy


@pytest.fixture
def condition(decoder):
    return decoder[0].encode(TEXTS)


@pytest.fixture
def create(decoder):
    return lambda guidance=1.0, **settings: FlowPolicy(tiny_renderer(decoder, guidance), Exploration(**settings))


def moved(policy, factor=1.05):
    for weight in policy.learner.network.parameters():
        weight.data.mul_(factor)


@pytest.mark.parametrize("ratio", OTHERS)
@pytest.mark.parametrize(
    "settings", [{}, {"guidance": 4.0}, {"guidance": 4.0, "guidance_in_update": "conditional"}, {"noise": "cps", "window": 3}],
    ids=["plain", "guided", "conditional", "cps"],
)  # fmt: skip
def test_the_ratio_is_one_and_the_first_gradient_is_the_densitys(create, condition, ratio, settings):
    gradients = []
    for kind in ("density", ratio):
        policy = create(**settings, ratio=kind)
        policy.learner.network.requires_grad_(True)
        trajectory = policy.sample(condition, SEEDS)
        assert (trajectory.mean_RS is None) == (kind == "density")
        logp_NS = policy.logprobs(trajectory)
        torch.testing.assert_close(logp_NS.detach(), trajectory.logp_RS, atol=3e-6, rtol=0)
        by_std = (kind, ratio) == ("density", "ratio_norm")  # RatioNorm weighs steps so
        (logp_NS * (policy.moments(trajectory)[1] if by_std else 1.0)).sum().backward()
        gradients.append(policy.learner.network.base.proj_out.weight.grad)
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4 * gradients[0].abs().max().item(), rtol=1e-3)


@pytest.mark.parametrize("ratio", OTHERS)
def test_after_an_update_it_is_the_plain_formula_of_recorded_and_present_means(create, condition, ratio):
    policy = create(ratio=ratio, window=2, start="random")
    policy.learner.network.double()
    trajectory = policy.sample(condition, SEEDS)
    moved(policy)
    (mean_NS, std_NS), logp_NS = policy.moments(trajectory), policy.logprobs(trajectory)
    assert trajectory.mean_RS.shape == trajectory.actions_RS.shape == mean_NS.shape
    for row in range(4):
        for step in range(2):
            given = trajectory.actions_RS[row, step], mean_NS[row, step], trajectory.mean_RS[row, step], std_NS[row, step].item()
            assert logp_NS[row, step].item() == pytest.approx(plain(*given, ratio == "ratio_norm")[0], abs=1e-9)
    masked = replace(trajectory, mask_RS=torch.tensor([[1.0, 0.0]] * 4))
    assert policy.logprobs(masked)[:, 1].eq(0).all()


def test_rows_and_gradients_do_not_depend_on_their_batch(create, condition):
    policy = create(ratio="centred", window=2, start="random")
    policy.learner.network.requires_grad_(True)
    together = policy.sample(condition, SEEDS)
    policy.renderer.rendering = replace(policy.renderer.rendering, rows=3)
    turned = [2, 3, 0, 1]
    part = policy.sample(condition.index(turned), [SEEDS[row] for row in turned])
    for name in ("actions_RS", "mean_RS", "logp_RS"):
        torch.testing.assert_close(getattr(part, name), getattr(together, name)[turned], atol=3e-5, rtol=0)
    moved(policy)
    gradients = []
    for split in ([range(4)], [[1], [3, 0], [2]]):
        policy.learner.network.zero_grad()
        for rows in split:
            chosen = together.select(list(rows))
            assert torch.equal(chosen.mean_RS, together.mean_RS[list(rows)])
            policy.logprobs(chosen).sum().backward()
        gradients.append(policy.learner.network.base.proj_out.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ratio", OTHERS)
def test_the_kl_term_is_zero_at_the_reference_and_nowhere_negative(create, condition, ratio):
    """Also where the sampler is another policy than both, which is why the reference's log-probs are of the same kind."""
    policy = create(ratio=ratio)
    Full().attach(policy.learner, keep_reference=True)
    moved(policy, 1.02)
    trajectory = policy.sample(condition, SEEDS)
    with torch.no_grad(), policy.learner.reference():
        reference_NS = policy.logprobs(trajectory)
        density_NS = create().logprobs(trajectory)  # of the same weights
    divergence = GRPOLoss(kl="k3").divergence
    assert divergence(reference_NS - policy.logprobs(trajectory)).detach().min() > -1e-7
    exact_NS = policy.divergence(trajectory).detach()
    moved(policy, 1 / 1.02)  # back to the reference
    torch.testing.assert_close(policy.logprobs(trajectory).detach(), reference_NS, atol=1e-4, rtol=0)
    off_NS = density_NS - policy.logprobs(trajectory).detach()  # what the reference's density would leave there
    if ratio == "centred":
        torch.testing.assert_close(off_NS, -exact_NS, atol=1e-3, rtol=1e-2)
        assert off_NS.shape == (4, STEPS - 1)
        assert off_NS.abs().max() > 1e-3
