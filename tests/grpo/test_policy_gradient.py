"""The loss as a policy gradient: exact expectations, REINFORCE on-policy, invariance to how a batch is cut."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from uae.grpo import Correction, GRPOLoss, group_advantages, token_logprobs

from . import reference

ACTIONS = 6


def bandit_terms(z_V, reward_V, temperature, loss, ref_logp_V=None):
    """One row per action of a one-step bandit, scored through the real log-probs."""
    identity = torch.eye(ACTIONS, dtype=torch.float64)
    hidden_VV = z_V.expand(ACTIONS, ACTIONS)
    logp_V, _ = token_logprobs(hidden_VV, identity, torch.arange(ACTIONS), temperature)
    logp_V1 = logp_V[:, None]
    ref = None if ref_logp_V is None else ref_logp_V[:, None]
    return logp_V, loss(logp_V1, logp_V1.detach(), reward_V, torch.ones(ACTIONS, 1), ref)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("importance", ["token", "sequence", "sequence_token"])
def test_expected_gradient_is_the_exact_policy_gradient(temperature, importance):
    """Averaged over the policy's actions, the loss gradient is -d E[reward] / d logits, whatever the baseline."""
    z_V = torch.randn(ACTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    reward_V = torch.tensor([0.1, 0.9, -0.3, 0.5, 0.0, 2.0], dtype=torch.float64)
    p_V = (z_V / temperature).softmax(0)
    (exact_V,) = torch.autograd.grad((p_V * reward_V).sum(), z_V)
    for baseline in (0.0, reward_V.mean(), -3.0):
        expected_V = torch.zeros_like(z_V)
        for action in range(ACTIONS):
            only = torch.zeros(ACTIONS, dtype=torch.float64)
            only[action] = reward_V[action] - baseline
            _, terms = bandit_terms(z_V, only, temperature, GRPOLoss(importance=importance))
            (gradient_V,) = torch.autograd.grad(terms.loss, z_V)
            expected_V += p_V[action].detach() * gradient_V * ACTIONS  # the loss is a mean over rows
        assert_close(expected_V, -exact_V, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_kl_estimators_in_expectation(kl):
    """E[k1] = E[k3] = KL(policy || reference); the gradient of k2 is the KL's, of k3 the reverse KL's, of k1 zero."""
    generator = torch.Generator().manual_seed(1)
    z_V = torch.randn(ACTIONS, generator=generator, dtype=torch.float64).requires_grad_()
    ref_V = torch.randn(ACTIONS, generator=generator, dtype=torch.float64).log_softmax(0)
    p_V = z_V.log_softmax(0).exp()
    forward = (p_V * (p_V.log() - ref_V)).sum()
    reverse = (ref_V.exp() * (ref_V - p_V.log())).sum()
    value, gradient_V = 0.0, torch.zeros_like(z_V)
    for action in range(ACTIONS):
        logp = z_V.log_softmax(0)[action].reshape(1, 1)
        arguments = (logp.detach(), torch.zeros(1), torch.ones(1, 1), ref_V[action].reshape(1, 1))
        terms = GRPOLoss(beta=1.0, kl=kl)(logp, *arguments)
        value += p_V[action].item() * terms.kl.item()
        gradient_V += p_V[action].detach() * torch.autograd.grad(terms.loss, z_V)[0]
    if kl != "k2":
        assert value == pytest.approx(forward.item(), abs=1e-12)
    target = {"k1": 0 * forward, "k2": forward, "k3": reverse}[kl]
    assert_close(gradient_V, torch.autograd.grad(target, z_V)[0], atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("epsilons", [(0.0, 0.0), (0.2, 0.2), (0.01, 0.9), (5.0, 5.0)])
@pytest.mark.parametrize("delta", [None, 1.001])
def test_on_policy_gradient_is_reinforce(epsilons, delta):
    """With ratio 1 nothing is clipped: the gradient is that of -A * logp, averaged the same way."""
    logp, _, advantage, mask, _ = reference.random_case(0).tensors()
    terms = GRPOLoss(*epsilons, delta=delta)(logp, logp.detach(), advantage, mask)
    terms.loss.backward()
    reinforce_NT = -advantage[:, None] * mask / mask.sum(1, keepdim=True) / len(mask)
    assert_close(logp.grad, reinforce_NT, atol=1e-15, rtol=1e-12)
    assert terms.ratio_mean == 1
    assert terms.ratio_max == 1
    assert terms.clip_fraction == 0


@pytest.mark.parametrize("kl", ["k2", "k3"])
def test_kl_has_no_pull_at_the_reference(kl):
    logp, _, advantage, mask, _ = reference.random_case(1).tensors()
    terms = GRPOLoss(beta=10.0, kl=kl)(logp, logp.detach(), 0 * advantage, mask, logp.detach())
    terms.loss.backward()
    assert terms.kl == 0
    assert (logp.grad == 0).all()


@pytest.mark.parametrize("aggregation", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("importance", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (2, 2, 2, 2), (1,) * 8])
def test_gradient_does_not_depend_on_the_micro_batches(aggregation, importance, sizes):
    """1x8, 2x4, 4x2 and 8x1 give one gradient through a shared parameter, with rows of different length."""
    loss = GRPOLoss(0.15, 0.3, beta=0.1, aggregation=aggregation, importance=importance, max_tokens=9, delta=1.6)
    case = reference.random_case(7, rows=8, tokens=7, empty_row=True)
    logp, old, advantage, mask, ref = (t.detach() for t in case.tensors())
    token_mean = aggregation in ("bnpo", "dapo")
    shift = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    window = mask.sum()
    total = 0.0
    for rows in torch.arange(8).split(sizes):
        terms = loss(logp[rows] + shift, old[rows], advantage[rows], mask[rows], ref[rows], window if token_mean else None)
        share = terms.loss if token_mean else terms.loss / len(sizes)
        share.backward()
        total += share.item()
    expected = reference.loss_and_gradient(
        case,
        eps_low=0.15,
        eps_high=0.3,
        beta=0.1,
        aggregation=aggregation,
        importance=importance,
        max_tokens=9,
        delta=1.6,
    )
    assert total == pytest.approx(expected["loss"], abs=1e-12)
    column = torch.tensor(expected["gradient"], dtype=torch.float64).sum(0)
    assert_close(shift.grad, column, atol=1e-12, rtol=0)


def test_local_token_mean_is_not_invariant_which_is_why_a_normalizer_exists():
    logp, old, advantage, mask, _ = (t.detach() for t in reference.random_case(7, rows=8).tensors())
    loss = GRPOLoss(aggregation="bnpo")
    whole = loss(logp, old, advantage, mask).loss
    halves = [loss(logp[r], old[r], advantage[r], mask[r]).loss for r in torch.arange(8).split(4)]
    assert abs(sum(halves) / 2 - whole) > 1e-3


@pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo"])
@pytest.mark.parametrize("sizes", [(8,), (4, 4), (1,) * 8])
def test_rows_that_are_left_out_are_left_out_of_the_divisor(aggregation, sizes):
    """With the number of the other rows as normalizer, masked rows are as if they had never been drawn."""
    loss = GRPOLoss(0.15, 0.3, beta=0.1, aggregation=aggregation, max_tokens=9)
    logp, old, advantage, mask, ref = (t.detach() for t in reference.random_case(7, rows=8, tokens=7).tensors())
    left = torch.tensor([0, 3, 4])
    mask[left] = 0.0
    kept = [row for row in range(8) if row not in left]
    expected = loss(*(t[kept] for t in (logp, old, advantage, mask, ref))).loss
    total = sum(loss(*(t[rows] for t in (logp, old, advantage, mask, ref)), len(kept)).loss for rows in torch.arange(8).split(sizes))
    assert_close(total, expected, atol=1e-12, rtol=0)


def test_kl_weighted_by_the_ratio_has_the_gradient_of_the_divergence_off_policy():
    """Drawn from an older policy, k1 and k3 times the ratio are KL(policy, reference) and move the policy as it does."""
    generator = torch.Generator().manual_seed(2)
    z_V, old_V, ref_V = (torch.randn(ACTIONS, generator=generator, dtype=torch.float64) for _ in range(3))
    z_V.requires_grad_()
    old_V, ref_V = old_V.log_softmax(0), ref_V.log_softmax(0)
    p_V = z_V.softmax(0)
    forward = (p_V * (p_V.log() - ref_V)).sum()
    (exact_V,) = torch.autograd.grad(forward, z_V, retain_graph=True)
    for kl in ("k1", "k3"):
        value, gradient_V = 0.0, torch.zeros_like(z_V)
        for action in range(ACTIONS):
            logp = z_V.log_softmax(0)[action].reshape(1, 1)
            arguments = (old_V[action].reshape(1, 1), torch.zeros(1), torch.ones(1, 1), ref_V[action].reshape(1, 1))
            terms = GRPOLoss(beta=1.0, kl=kl, kl_weighting="ratio")(logp, *arguments)
            value += old_V[action].exp().item() * terms.kl.item()
            gradient_V += old_V[action].exp() * torch.autograd.grad(terms.loss, z_V)[0]
        assert value == pytest.approx(forward.item(), abs=1e-12)
        assert_close(gradient_V, exact_V, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_entropy_bonus_has_the_gradient_of_the_entropy(temperature):
    z_V = torch.randn(ACTIONS, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
    logp_V = (z_V / temperature).log_softmax(0)
    entropy = -(logp_V.exp() * logp_V).sum()
    (exact_V,) = torch.autograd.grad(entropy, z_V, retain_graph=True)
    expected_V = torch.zeros_like(z_V)
    for action in range(ACTIONS):
        logp = (z_V / temperature).log_softmax(0)[action].reshape(1, 1)
        terms = GRPOLoss(entropy_bonus=0.7)(
            logp, logp.detach(), torch.zeros(1), torch.ones(1, 1), entropy=entropy.detach().reshape(1, 1)
        )
        expected_V += logp_V[action].exp().detach() * torch.autograd.grad(terms.loss, z_V)[0]
    assert_close(expected_V, -0.7 * exact_V, atol=1e-12, rtol=1e-10)


def expected_gradient(z_V, sampler_V, reward_V, reference_V, loss, correction):
    """The gradient of the loss, averaged exactly over actions that a sampler draws."""
    gradient_V = torch.zeros_like(z_V)
    for action in range(ACTIONS):
        logp, sampled, ref = (values[action].reshape(1, 1) for values in (z_V.log_softmax(0), sampler_V, reference_V))
        ones, entropy = torch.ones(1, 1), -(z_V.softmax(0) * z_V.log_softmax(0)).sum().detach().reshape(1, 1)
        weights = None if correction is None else correction(sampled, logp, ones)
        terms = loss(logp, logp.detach(), reward_V[action].reshape(1), ones, ref, weights=weights, entropy=entropy)
        gradient_V += sampled.exp().squeeze() * torch.autograd.grad(terms.loss, z_V)[0]
    return gradient_V


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("bias", ["temperature", "bfloat16", "stale"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_biased_sampler_is_corrected(surrogate, bias, level):
    """The corrected gradient is the exact one of the policy; without correction it is off."""
    generator = torch.Generator().manual_seed(4)
    z_V, step_V, ref_V = (torch.randn(ACTIONS, generator=generator, dtype=torch.float64) for _ in range(3))
    reward_V = torch.tensor([0.1, 0.9, -0.3, 0.5, 0.0, 2.0], dtype=torch.float64)
    sampler_V = {
        "temperature": (z_V / 1.1).log_softmax(0),
        "bfloat16": z_V.bfloat16().log_softmax(0).double().log_softmax(0),
        "stale": (z_V - 0.1 * step_V).log_softmax(0),
    }[bias]
    z_V.requires_grad_()
    logp_V = z_V.log_softmax(0)
    entropy = -(logp_V.exp() * logp_V).sum()
    divergence = (logp_V.exp() * (logp_V - ref_V.log_softmax(0))).sum()
    exact_V = torch.autograd.grad(-(logp_V.exp() * reward_V).sum() + 0.2 * divergence - 0.1 * entropy, z_V)[0]
    loss = GRPOLoss(beta=0.2, kl="k3", kl_weighting="ratio", surrogate=surrogate, entropy_bonus=0.1)
    arguments = (z_V, sampler_V, reward_V, ref_V.log_softmax(0), loss)
    corrected_V = expected_gradient(*arguments, Correction(level, high=8.0))
    assert_close(corrected_V, exact_V, atol=1e-8, rtol=0)
    off = (expected_gradient(*arguments, None) - exact_V).abs().max()
    assert off > (1e-4 if bias == "bfloat16" else 5e-3)


def test_bandit_learns_its_best_action():
    """The pieces together: sample groups, normalise rewards, clip, step. The best of six actions takes over."""
    generator = torch.Generator().manual_seed(0)
    reward_V = torch.tensor([0.80, 0.81, 0.82, 0.86, 0.79, 0.83])
    z_V = torch.zeros(ACTIONS, requires_grad=True)
    optimizer = torch.optim.Adam([z_V], lr=0.1)
    loss = GRPOLoss(beta=0.0)
    for _ in range(60):
        actions_BG = torch.multinomial(z_V.detach().softmax(0).expand(4, -1), 8, replacement=True, generator=generator)
        advantage_BG = group_advantages(reward_V[actions_BG], "batch")
        logp_N1 = z_V.log_softmax(0)[actions_BG.reshape(-1, 1)]
        terms = loss(logp_N1, logp_N1.detach(), advantage_BG.reshape(-1), torch.ones(32, 1))
        optimizer.zero_grad()
        terms.loss.backward()
        optimizer.step()
    assert z_V.softmax(0)[3] > 0.9
