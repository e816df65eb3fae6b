"""Named mistakes, planted into the source one at a time, must turn a compact reference check red.

The mutated module lives in memory only. A mutation whose text is no longer in the source fails, so the list cannot rot.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from uae.grpo import logprobs
from uae.grpo.output_layer import SMALL, reorders

from . import reference

REORDERS = reorders(torch.empty(SMALL, 1))  # whether products on this machine's CPU read a copy of the weight


def source_of(name: str) -> str:
    return Path(importlib.util.find_spec(f"uae.grpo.{name}").origin).read_text()


def load(name: str, source: str, monkeypatch) -> types.ModuleType:
    module = types.ModuleType(f"mutated_{name}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look their module up
    exec(compile(source, f"<{module.__name__}>", "exec"), module.__dict__)
    return module


def check_advantages(module: types.ModuleType) -> None:
    rewards = [[0.1, 0.7, 0.4], [math.nan, 0.5, 0.9], [0.3, 0.3, 0.3], [5.0, 1.0, -2.0]]
    reward_BG = torch.tensor(rewards, dtype=torch.float64)
    for scale, eps, correction in [("group", 0.02, 1), ("group", 0.02, 0), ("batch", 0.02, 1), ("none", 0.02, 1)]:
        expected = torch.tensor(reference.advantages(rewards, scale, eps, correction), dtype=torch.float64)
        got = module.group_advantages(reward_BG, scale, eps, correction)
        assert_close(got, expected, atol=1e-9, rtol=1e-9)
    given = module.group_advantages(reward_BG[:1], "batch", 0.0, batch_std=2.0)
    assert_close(given, (reward_BG[:1] - 0.4) / 2, atol=1e-9, rtol=1e-9)
    assert module.zero_variance_share(reward_BG).item() == 0.25


def check_loss(module: types.ModuleType) -> None:
    case = reference.random_case(0, empty_row=True)
    shared = {"beta": 0.07, "delta": 1.35, "max_tokens": 11}
    for aggregation, importance, kl, normalizer in [
        ("grpo", "token", "k1", None),
        ("bnpo", "token", "k2", None),
        ("bnpo", "sequence", "k3", 61.0),
        ("dapo", "sequence", "k3", 61.0),
        ("dr_grpo", "token", "k3", None),
        ("grpo", "sequence_token", "k3", 61.0),
        ("dr_grpo", "token", "k1", 61.0),
    ]:
        variant = {"aggregation": aggregation, "importance": importance, "kl": kl, **shared}
        if kl == "k1":
            variant |= {"kl_weighting": "ratio", "entropy_bonus": 0.2, "top_entropy": 0.3}
        logp, old, advantage, mask, ref = case.tensors()
        junk = mask == 0
        old, ref = old.masked_fill(junk, math.nan), ref.masked_fill(junk, math.inf)
        weights, entropy = (values.masked_fill(junk, math.nan) for values in case.extras())
        terms = module.GRPOLoss(0.1, 0.28, **variant)(logp, old, advantage, mask, ref, normalizer, weights, entropy)
        terms.loss.backward()
        expected = reference.loss_and_gradient(case, eps_low=0.1, eps_high=0.28, normalizer=normalizer, weighted=True, **variant)
        assert_close(logp.grad, torch.tensor(expected["gradient"], dtype=torch.float64), atol=1e-9, rtol=0)
        for name in ("loss", "policy", "kl", "clip_fraction", "ratio_mean", "ratio_max"):
            assert abs(getattr(terms, name).item() - expected[name]) < 1e-9, name


def check_surrogates(module: types.ModuleType) -> None:
    """Value and slope of every surrogate, at ratios on both sides of all limits and for both signs of the advantage."""
    for ratio, advantage in itertools.product([0.4, 0.85, 1.0, 1.1, 1.3, 2.5], [-1.5, 0.7]):
        r, a = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True), torch.tensor([[advantage]], dtype=torch.float64)
        logp = torch.tensor([[-0.3]], dtype=torch.float64, requires_grad=True)
        value, slope = reference._token_policy(ratio, advantage, 0.1, 0.2, 1.8)
        got = module.clip(r, a, 0.1, 0.2, 1.8)
        assert abs(got.item() - value) < 1e-12
        assert abs(torch.autograd.grad(got, r)[0].item() - slope) < 1e-12
        got = module.cispo(r, a, logp, 0.2)
        weight = -min(ratio, 1.2) * advantage
        assert abs(got.item() - weight * -0.3) < 1e-12
        assert abs(torch.autograd.grad(got, logp)[0].item() - weight) < 1e-12
        tau = 1.3 if advantage > 0 else 2.1
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        got = module.sapo(r, a, 1.3, 2.1)
        assert abs(got.item() + 4 / tau * gate * advantage) < 1e-12
        assert abs(torch.autograd.grad(got, r)[0].item() + 4 * gate * (1 - gate) * advantage) < 1e-12


def check_importance(module: types.ModuleType) -> None:
    case = reference.random_case(0, empty_row=True)
    logp, old, _, mask, _ = case.tensors()
    junk = old.masked_fill(mask == 0, math.nan)
    for level, mode in itertools.product(["token", "sequence"], ["truncate", "mask"]):
        weights = module.importance_weights(junk, logp, mask, level, mode, 0.9, 1.1)
        expected = reference.importance_weights(case.old, case.logp, case.mask, level, mode, 0.9, 1.1)
        assert_close(weights, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
        assert not weights.requires_grad
    assert abs(module.effective_sample_size(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]])).item() - 0.8) < 1e-6


def check_output_layer(module: types.ModuleType) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logprobs, "OutputLayer", module.OutputLayer)
        check_logprobs(logprobs)
    if not REORDERS:
        return
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 2048, generator=generator), torch.randn(8192, 2048, generator=generator)
    layer = module.OutputLayer(weight, 0.7)
    assert_close(layer(hidden).double(), hidden.double() @ weight.double().t() / 0.7, atol=2e-3, rtol=0)
    for rows in (slice(0, 1), slice(3, 4), slice(2, 7)):
        assert torch.equal(layer(hidden[rows]), layer(hidden)[rows])


def check_logprobs(module: types.ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias, upstream = draw(5, 3), draw(7, 3), draw(7), draw(5)
    ids, banned = torch.tensor([0, 3, 6, 3, 1]), [2, 5]
    rows = [reference.token_logprob(hidden[m].tolist(), weight.tolist(), ids[m].item(), 0.7, banned, bias.tolist()) for m in range(5)]
    for trained in (False, True):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        logp, entropy = module.token_logprobs(*leaves, ids, 0.7, 2, torch.tensor(banned), bias)
        assert_close(logp.detach(), torch.tensor([row[0] for row in rows], dtype=torch.float64))
        assert_close(entropy, torch.tensor([row[1] for row in rows], dtype=torch.float64))
        (logp * upstream).sum().backward()
        expected = torch.tensor([row[2] for row in rows], dtype=torch.float64) * upstream[:, None]
        assert_close(leaves[0].grad, expected, atol=1e-9, rtol=0)
        if trained:
            expected = (torch.tensor([row[3] for row in rows], dtype=torch.float64) * upstream[:, None, None]).sum(0)
            assert_close(leaves[1].grad, expected, atol=1e-9, rtol=0)
        capped = lambda *leaves: module.token_logprobs(*leaves, ids, 0.7, 2, rule=module.LogitRule(cap=1.5))[0]  # noqa: B023, E731
        assert torch.autograd.gradcheck(
            capped, [one.detach().requires_grad_(one.requires_grad) for one in leaves], raise_exception=False
        )


CHECKS = {
    "advantages": check_advantages,
    "importance": check_importance,
    "logprobs": check_logprobs,
    "output_layer": check_output_layer,
    "loss": check_loss,
    "surrogates": check_surrogates,
}

MUTATIONS = {
    # advantages.py
    "mean not subtracted": ("advantages", "(reward_BG - mean_B1).masked_fill", "reward_BG.masked_fill"),
    "mean over the wrong axis": (
        "advantages",
        "reward_BG.nansum(1, keepdim=True)",
        "reward_BG.nansum(0, keepdim=True)",
    ),
    "std over the wrong axis": ("advantages", ".square().sum(1, keepdim", ".square().sum(0, keepdim"),
    "group scale ignored": ("advantages", 'if scale == "group":', 'if scale == "none":'),
    "std correction ignored": ("advantages", "sum(1, keepdim=True) - correction", "sum(1, keepdim=True) - 1"),
    "NaN rewards counted in the mean": (
        "advantages",
        "scored_BG.sum(1, keepdim=True).clamp(min=1)",
        "reward_BG.shape[1]",
    ),
    "eps ignored": ("advantages", "scored_BG, std_correction) + eps", "scored_BG, std_correction)"),
    "batch_std of the caller ignored": ("advantages", "if batch_std is None:", "if True:"),
    "share of groups with variance": ("advantages", "std_B1 <= tolerance", "std_B1 > tolerance"),
    # loss.py
    "sign of the log-ratio": ("loss", "            return log_ratio_NT.exp()", "            return (-log_ratio_NT).exp()"),
    "gradient of a whole row": (
        "loss",
        "(mean_N1.detach() + log_ratio_NT - log_ratio_NT.detach()).exp()",
        "mean_N1.expand_as(log_ratio_NT).exp()",
    ),
    "mask ignored": ("loss", "valid_NT = mask.bool()", "valid_NT = torch.ones_like(mask).bool()"),
    "mask dropped from the inputs": ("loss", "values_NT.to(dtype).masked_fill(~valid_NT, 0.0)", "values_NT.to(dtype)"),
    "row length counts padding": ("loss", "tokens_N = valid_NT.sum(1)", "tokens_N = torch.ones_like(valid_NT).sum(1)"),
    "epsilons swapped": (
        "loss",
        "advantage_NT, self.epsilon_low, self.epsilon_high, self.delta",
        "advantage_NT, self.epsilon_high, self.epsilon_low, self.delta",
    ),
    "delta ignored": ("loss", "self.epsilon_low, self.epsilon_high, self.delta", "self.epsilon_low, self.epsilon_high, None"),
    "weights ignored": ("loss", "terms_NT * weight_NT", "terms_NT"),
    "KL not weighted": ("loss", "_times(divergence_NT, weight_NT)", "_times(divergence_NT, None)"),
    "KL weighted by a constant": (
        "loss",
        "divergence_NT = divergence_NT * log_ratio_NT.exp()",
        "divergence_NT = divergence_NT * log_ratio_NT.exp().detach()",
    ),
    "KL weighting ignored": ("loss", 'if self.kl_weighting == "ratio":', "if False:"),
    "entropy bonus of the wrong sign": ("loss", "loss = loss - self.entropy_bonus", "loss = loss + self.entropy_bonus"),
    "entropy bonus without baseline": ("loss", ' - _given(entropy_NT, "entropy_bonus")', ""),
    "smallest entropies": ("loss", "(entropy_NT >= threshold)", "(entropy_NT < threshold)"),
    "share of the others": ("loss", "(len(values) - 1) * (1 - share)", "(len(values) - 1) * share"),
    # surrogates.py
    "minimum became maximum": ("surrogates", "capped <= clipped", "capped >= clipped"),
    "sign of the policy loss": ("surrogates", "return -torch.where(", "return torch.where("),
    "no clipping": ("surrogates", "ratio.clamp(1 - low, 1 + high)", "ratio"),
    "delta caps from below": ("surrogates", "ratio.clamp(max=delta)", "ratio.clamp(min=delta)"),
    "cispo capped from below": ("surrogates", "clamp(max=1 + high)", "clamp(min=1 + high)"),
    "cispo's cap is high alone": ("surrogates", "clamp(max=1 + high)", "clamp(max=high)"),
    "cispo without ratio": ("surrogates", "-ratio.detach().clamp(max=1 + high) * advantage", "-advantage"),
    "sapo's temperatures swapped": ("surrogates", "torch.where(advantage > 0,", "torch.where(advantage <= 0,"),
    "sapo not scaled": ("surrogates", "-4 / tau *", "-4 *"),
    "sapo's centre": ("surrogates", "(tau * (ratio - 1))", "(tau * ratio)"),
    # importance.py
    "weights upside down": ("importance", "return gap_NT.exp()", "return (-gap_NT).exp()"),
    "sequence weight is a product": ("importance", " / valid_NT.sum(1, keepdim=True).clamp(min=1)).expand_as", ").expand_as"),
    "range ignored by truncation": ("importance", "ratio_NT.clamp(self.low", "ratio_NT.clamp(0.0"),
    "mask mode truncates": ("importance", 'if self.mode == "mask":', "if False:"),
    "weights with a gradient": ("importance", "old_logp.detach().to(dtype)", "old_logp.to(dtype)"),
    "effective size counts padding": ("importance", "(mask.bool().sum() *", "(mask.numel() *"),
    # loss.py again
    "direction of the KL": (
        "loss",
        "_filled(ref_logp.detach(), valid_NT) - logp_NT",
        "logp_NT - _filled(ref_logp.detach(), valid_NT)",
    ),
    "sign of k1": ("loss", "return -d_NT\n", "return d_NT\n"),
    "half of k2 forgotten": ("loss", "d_NT.square() / 2", "d_NT.square()"),
    "sign in k3": ("loss", "d_NT.exp() - d_NT - 1", "d_NT.exp() + d_NT - 1"),
    "KL detached": ("loss", "loss = loss + self.beta * kl", "loss = loss + self.beta * kl.detach()"),
    "beta ignored": ("loss", "loss = loss + self.beta * kl", "loss = loss + kl"),
    "old log-probs replaced by the new": (
        "loss",
        "log_ratio_NT = logp_NT - _filled(old_logp.detach(), valid_NT)",
        "log_ratio_NT = logp_NT - logp_NT.detach()",
    ),
    "normalizer ignored": ("loss", "if normalizer is None:", "if True:"),
    "sequence ratio is a sum": ("loss", " / valid_NT.sum(1, keepdim=True).clamp(min=1)", ""),
    "sequence importance ignored": ("loss", 'if self.importance == "token":', "if True:"),
    "rows are not counted": ("loss", 'len(total_N) if self.window == "none" else tokens_N.sum()', "tokens_N.sum()"),
    "dr_grpo divides by tokens": ("loss", "(count * self.max_tokens)", "tokens_N.sum()"),
    "clip fraction ignores the advantage": ("loss", " & (advantage_NT < 0)", ""),
    "ratio_max over padding": (
        "loss",
        "ratio_NT = ratio_NT.masked_fill(~valid_NT, 0.0)",
        "ratio_NT = ratio_NT.masked_fill(~valid_NT, 9.0)",
    ),
    # output_layer.py
    "temperature ignored": ("output_layer", "logits_CV /= self.temperature", "logits_CV /= 1"),
    "temperature multiplies": ("output_layer", "logits_CV /= self.temperature", "logits_CV *= self.temperature"),
    "bias after the temperature": ("output_layer", "logits_CV += self.bias_V", "logits_CV += self.bias_V * self.temperature"),
    "banned ids allowed": ("output_layer", "return logits_CV if self.banned is None else", "return logits_CV if True else"),
    # logprobs.py
    "temperature missing from the gradient": ("logprobs", "slope_CV.div_(layer.temperature)", "slope_CV"),
    "probabilities written over logits that a cap needs": ("logprobs", "if layer.rule.cap is None and", "if"),
    "sign of the gradient": ("logprobs", "softmax_CV.neg_()", "softmax_CV"),
    "one-hot missing": ("logprobs", "torch.ones_like(slope_CV[:, :1])", "torch.zeros_like(slope_CV[:, :1])"),
    "incoming gradient ignored": ("logprobs", "slope_MD * grad_M[:, None]", "slope_MD * 1"),
    "head sees one chunk only": ("logprobs", "grad_weight_VD += product", "grad_weight_VD = product"),
    "entropy of the wrong sign": (
        "logprobs",
        "torch.special.entr(softmax_CV).sum(1)",
        "-torch.special.entr(softmax_CV).sum(1)",
    ),
}
if REORDERS:
    MUTATIONS["pieces of the head in reverse"] = ("output_layer", "in self._kept or", "in self._kept[::-1] or")
    MUTATIONS["a row alone"] = ("output_layer", "if len(rows_RD) == 1:", "if False:")


@pytest.mark.parametrize("name", CHECKS)
def test_the_source_is_green(name, monkeypatch):
    CHECKS[name](load(name, source_of(name), monkeypatch))


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_planted_mistake_is_red(mutation, monkeypatch):
    name, original, mistake = MUTATIONS[mutation]
    source = source_of(name)
    assert source.count(original) == 1, f"{original!r} must be in {name}.py exactly once: update the mutation"
    module = load(name, source.replace(original, mistake), monkeypatch)
    with pytest.raises(AssertionError):
        CHECKS[name](module)
