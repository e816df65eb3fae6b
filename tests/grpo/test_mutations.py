"""Named mistakes, planted into the source one at a time, must turn a compact reference check red.

The mutated module lives in memory only. A mutation whose text is no longer in the source fails, so the list cannot rot.
"""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from . import reference


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
    ]:
        variant = {"aggregation": aggregation, "importance": importance, "kl": kl, **shared}
        logp, old, advantage, mask, ref = case.tensors()
        junk = mask == 0
        old, ref = old.masked_fill(junk, math.nan), ref.masked_fill(junk, math.inf)
        terms = module.GRPOLoss(0.1, 0.28, **variant)(logp, old, advantage, mask, ref, normalizer)
        terms.loss.backward()
        expected = reference.loss_and_gradient(case, eps_low=0.1, eps_high=0.28, normalizer=normalizer, **variant)
        assert_close(logp.grad, torch.tensor(expected["gradient"], dtype=torch.float64), atol=1e-9, rtol=0)
        for name in ("loss", "policy", "kl", "clip_fraction", "ratio_mean", "ratio_max"):
            assert abs(getattr(terms, name).item() - expected[name]) < 1e-9, name


def check_logprobs(module: types.ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias, upstream = draw(5, 3), draw(7, 3), draw(7), draw(5)
    ids, banned = torch.tensor([0, 3, 6, 3, 1]), [2, 5]
    rows = [
        reference.token_logprob(hidden[m].tolist(), weight.tolist(), ids[m].item(), 0.7, banned, bias.tolist())
        for m in range(5)
    ]
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


CHECKS = {"advantages": check_advantages, "loss": check_loss, "logprobs": check_logprobs}

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
    "sign of the log-ratio": ("loss", "return log_ratio_NT.exp()", "return (-log_ratio_NT).exp()"),
    "minimum became maximum": ("loss", "capped_NT <= clipped_NT", "capped_NT >= clipped_NT"),
    "sign of the policy loss": ("loss", "return -torch.where(", "return torch.where("),
    "mask ignored": ("loss", "valid_NT = mask.bool()", "valid_NT = torch.ones_like(mask).bool()"),
    "mask dropped from the inputs": ("loss", "values_NT.to(dtype).masked_fill(~valid_NT, 0.0)", "values_NT.to(dtype)"),
    "row length counts padding": ("loss", "tokens_N = valid_NT.sum(1)", "tokens_N = torch.ones_like(valid_NT).sum(1)"),
    "epsilons swapped": (
        "loss",
        "clamp(1 - self.epsilon_low, 1 + self.epsilon_high)",
        "clamp(1 - self.epsilon_high, 1 + self.epsilon_low)",
    ),
    "no clipping": ("loss", "ratio_NT.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)", "ratio_NT"),
    "delta ignored": ("loss", "ratio_NT if self.delta is None else", "ratio_NT if True else"),
    "delta caps from below": ("loss", "clamp(max=self.delta)", "clamp(min=self.delta)"),
    "direction of the KL": (
        "loss",
        "_filled(ref_logp.detach(), valid_NT) - logp_NT",
        "logp_NT - _filled(ref_logp.detach(), valid_NT)",
    ),
    "sign of k1": ("loss", "return -d_NT\n", "return d_NT\n"),
    "half of k2 forgotten": ("loss", "d_NT.square() / 2", "d_NT.square()"),
    "sign in k3": ("loss", "d_NT.exp() - d_NT - 1", "d_NT.exp() + d_NT - 1"),
    "KL detached": ("loss", "loss = policy + self.beta * kl", "loss = policy + self.beta * kl.detach()"),
    "beta ignored": ("loss", "loss = policy + self.beta * kl", "loss = policy + kl"),
    "old log-probs replaced by the new": ("loss", "_filled(old_logp.detach(), valid_NT)", "logp_NT.detach()"),
    "normalizer ignored": ("loss", "if normalizer is None:", "if True:"),
    "sequence ratio is a sum": ("loss", " / valid_NT.sum(1, keepdim=True).clamp(min=1)", ""),
    "sequence importance ignored": ("loss", 'self.importance == "sequence"', 'self.importance == "row"'),
    "dr_grpo divides by tokens": ("loss", "(len(total_N) * self.max_tokens)", "tokens_N.sum()"),
    "clip fraction ignores the advantage": ("loss", " & (advantage_NT < 0)", ""),
    "ratio_max over padding": (
        "loss",
        "ratio_NT = ratio_NT.masked_fill(~valid_NT, 0.0)",
        "ratio_NT = ratio_NT.masked_fill(~valid_NT, 9.0)",
    ),
    # logprobs.py
    "temperature ignored": ("logprobs", "logits_CV /= temperature", "logits_CV /= 1"),
    "temperature multiplies": ("logprobs", "logits_CV /= temperature", "logits_CV *= temperature"),
    "temperature missing from the gradient": ("logprobs", "slope_CV.div_(temperature)", "slope_CV"),
    "bias after the temperature": ("logprobs", "logits_CV += bias_V", "logits_CV += bias_V * temperature"),
    "banned ids allowed": ("logprobs", "return logits_CV if banned is None else", "return logits_CV if True else"),
    "sign of the gradient": ("logprobs", "softmax_CV.neg_()", "softmax_CV"),
    "one-hot missing": ("logprobs", "torch.ones_like(slope_CV[:, :1])", "torch.zeros_like(slope_CV[:, :1])"),
    "incoming gradient ignored": ("logprobs", "slope_MD * grad_M[:, None]", "slope_MD * 1"),
    "head sees one chunk only": ("logprobs", "grad_weight_VD += _matmul", "grad_weight_VD = _matmul"),
    "entropy of the wrong sign": (
        "logprobs",
        "torch.special.entr(softmax_CV).sum(1)",
        "-torch.special.entr(softmax_CV).sum(1)",
    ),
}


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
