"""Log-probs of tokens against log_softmax, plain loops and finite memory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from uae.grpo import LogitRule, selected_logprobs, token_logprobs

from . import reference

M, D, V = 23, 5, 37


def problem(seed=0, dtype=torch.float64, bias=False, m=M, d=D, v=V):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(m, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype)
    ids = torch.randint(0, v, (m,), generator=generator)
    upstream = torch.randn(m, generator=generator, dtype=torch.float64)
    bias_V = torch.randn(v, generator=generator, dtype=torch.float64).to(dtype) if bias else None
    return hidden, weight, ids, upstream, bias_V


def whole(hidden, weight, ids, temperature=1.0, banned=None, bias=None, rule=None):
    """The matrix that token_logprobs avoids."""
    logits = hidden @ weight.t() if bias is None else hidden @ weight.t() + bias
    if rule is not None:
        logits = rule.cap * torch.tanh(rule.scale * logits / rule.cap) if rule.cap else rule.scale * logits
    logits = logits / temperature
    if banned is not None:
        logits = logits.index_fill(-1, banned, -math.inf)
    logp = logits.log_softmax(-1)
    return logp.gather(-1, ids[..., None])[..., 0], torch.special.entr(logp.exp()).sum(-1)


@pytest.mark.parametrize(
    ("temperature", "banned", "bias", "trained_head", "chunk"),
    list(itertools.product([1.0, 0.37, 2.5], [None, [3, 11, 36]], [False, True], [False, True], [1, 8, 1024])),
)
def test_value_and_gradient_match_log_softmax(temperature, banned, bias, trained_head, chunk):
    hidden, weight, ids, upstream, bias_V = problem(bias=bias)
    banned = None if banned is None else torch.tensor(banned)
    if banned is not None:
        ids = torch.where(torch.isin(ids, banned), 0, ids)
    leaves = [hidden.requires_grad_()] + [t.requires_grad_() for t in (weight, bias_V) if trained_head and t is not None]
    logp, entropy = token_logprobs(hidden, weight, ids, temperature, chunk, banned, bias_V)
    expected, expected_entropy = whole(hidden, weight, ids, temperature, banned, bias_V)
    assert_close(logp, expected, atol=1e-12, rtol=1e-12)
    assert_close(entropy, expected_entropy, atol=1e-12, rtol=1e-12)
    assert not entropy.requires_grad
    got = torch.autograd.grad((logp * upstream).sum(), leaves)
    for g, e in zip(got, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True):
        assert_close(g, e, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("rule", [LogitRule(0.3), LogitRule(cap=1.5), LogitRule(-2.0, 3.0)])
@pytest.mark.parametrize("trained_head", [False, True])
def test_scaled_and_capped_logits(rule, trained_head):
    """As Granite and Gemma have them; at a temperature, with banned tokens, chunk by chunk."""
    hidden, weight, ids, upstream, bias_V = problem(bias=True)
    banned = torch.tensor([3, 11])
    ids = torch.where(torch.isin(ids, banned), 0, ids)
    leaves = [hidden.requires_grad_(), *(t.requires_grad_() for t in (weight, bias_V) if trained_head)]
    logp, entropy = token_logprobs(hidden, weight, ids, 0.6, 8, banned, bias_V, rule)
    expected, expected_entropy = whole(hidden, weight, ids, 0.6, banned, bias_V, rule)
    assert_close(logp, expected, atol=1e-12, rtol=1e-12)
    assert_close(entropy, expected_entropy, atol=1e-12, rtol=1e-12)
    got = torch.autograd.grad((logp * upstream).sum(), leaves)
    for g, e in zip(got, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True):
        assert_close(g, e, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("banned", [(), (2, 5)])
@pytest.mark.parametrize("trained_head", [False, True])
def test_value_and_gradient_match_plain_loops(banned, trained_head):
    hidden, weight, ids, _, bias_V = problem(3, bias=True, m=1, d=3, v=7)
    target = 4
    logp, entropy, grad_hidden, grad_weight = reference.token_logprob(
        hidden[0].tolist(), weight.tolist(), target, 0.7, banned, bias_V.tolist()
    )
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    banned_ids = torch.tensor(banned, dtype=torch.int64)
    got, got_entropy = token_logprobs(hidden, weight, torch.tensor([target]), 0.7, 4, banned_ids, bias_V)
    got.sum().backward()
    assert got.item() == pytest.approx(logp, abs=1e-12)
    assert got_entropy.item() == pytest.approx(entropy, abs=1e-12)
    assert_close(hidden.grad[0], torch.tensor(grad_hidden, dtype=torch.float64), atol=1e-12, rtol=0)
    if trained_head:
        assert_close(weight.grad, torch.tensor(grad_weight, dtype=torch.float64), atol=1e-12, rtol=0)


@pytest.mark.parametrize("trained_head", [False, True])
def test_gradcheck(trained_head):
    hidden, weight, ids, _, bias_V = problem(1, bias=True, m=4, d=3, v=5)
    leaves = (hidden.requires_grad_(), weight.requires_grad_(trained_head), bias_V.requires_grad_(trained_head))
    assert torch.autograd.gradcheck(lambda h, w, b: token_logprobs(h, w, ids, 0.8, 3, torch.tensor([1]), b)[0].clamp(min=-50), leaves)


@pytest.mark.parametrize("trained_head", [False, True])
def test_banned_ids_are_never_the_policy(trained_head):
    hidden, weight, _, _, _ = problem()
    banned = torch.tensor([0, 9])
    every = torch.arange(V).expand(M, V)
    hidden.requires_grad_()
    weight.requires_grad_(trained_head)
    logp, _ = token_logprobs(hidden[:, None].expand(M, V, D), weight, every, banned=banned)
    assert (logp[:, banned] == -math.inf).all()
    assert_close(logp.exp().sum(1), torch.ones(M, dtype=torch.float64))
    kept = torch.tensor([v for v in range(V) if v not in (0, 9)])
    assert_close(logp[:, kept].sum(), (hidden @ weight[kept].t()).log_softmax(1).sum())
    # What the loss sends back to a banned target is 0, and its -inf does not turn that into NaN.
    torch.where(logp.isinf(), 0.0, logp).sum().backward()
    assert hidden.grad.isfinite().all()
    assert weight.grad is None or (weight.grad.isfinite().all() and (weight.grad[banned] == 0).all())


@pytest.mark.parametrize("trained_head", [False, True])
def test_padding_may_hold_nan(trained_head):
    """A masked token sends gradient 0; a NaN in its hidden state must not leak into the other tokens or the head."""
    hidden, weight, ids, upstream, _ = problem()
    weight.requires_grad_(trained_head)
    upstream[[2, 7]] = 0
    grads = []
    for filler in (1.0, math.nan):
        states = hidden.clone()
        states[[2, 7]] = filler
        states.requires_grad_()
        leaves = [states, weight] if trained_head else [states]
        logp = token_logprobs(states, weight, ids, chunk=8)[0]
        grads.append(torch.autograd.grad(torch.where(upstream == 0, 0, logp * upstream).sum(), leaves))
    for clean, dirty in zip(*grads, strict=True):
        assert torch.equal(clean, dirty)


@pytest.mark.parametrize("trained_head", [False, True])
def test_bf16_is_accumulated_in_float32(trained_head):
    """bf16 inputs give what float64 gives on the same bf16 numbers: only the inputs are rounded, never the logits."""
    hidden, weight, ids, upstream, _ = problem(dtype=torch.bfloat16, m=64, d=256, v=999)
    weight = weight / 8
    leaves = [hidden.requires_grad_()] + ([weight.requires_grad_()] if trained_head else [])
    logp, entropy = token_logprobs(hidden, weight, ids, 0.9, chunk=16)
    assert logp.dtype == entropy.dtype == torch.float32
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected, expected_entropy = whole(exact[0], exact[1] if trained_head else weight.double(), ids, 0.9)
    assert_close(logp.double(), expected, atol=2e-5, rtol=0)
    assert_close(entropy.double(), expected_entropy, atol=2e-5, rtol=0)
    got = torch.autograd.grad((logp * upstream).sum(), leaves)
    for g, e in zip(got, torch.autograd.grad((expected * upstream).sum(), exact), strict=True):
        assert g.dtype == torch.bfloat16
        assert_close(g.double(), e, atol=1e-6, rtol=2**-8)  # one rounding to bf16, at the very end


@pytest.mark.parametrize("trained_head", [False, True])
def test_autocast_changes_nothing(trained_head):
    hidden, weight, ids, upstream, _ = problem(dtype=torch.float32)
    weight.requires_grad_(trained_head)
    results = []
    for enabled in (False, True):
        states = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logp, entropy = token_logprobs(states, weight, ids)
            grads = torch.autograd.grad((logp * upstream).sum(), [states, weight] if trained_head else [states])
        results.append([logp.detach(), entropy, *grads])
    for off, on in zip(*results, strict=True):
        assert torch.equal(off, on)


class LargestTensor(TorchDispatchMode):
    """The size of the largest tensor that any operation inside returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return out


def footprint(score, leaves):
    """Largest tensor made in forward and backward, and numbers saved in between."""
    saved = []
    with LargestTensor() as largest:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
            logp = score()
        torch.autograd.grad(logp.sum(), leaves)
    return largest.numel, sum(saved)


@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_matrix_of_logits_is_made_or_saved(trained_head, dtype):
    m, d, v, chunk = 512, 8, 300, 16
    hidden, weight, ids, _, _ = problem(dtype=dtype, m=m, d=d, v=v)
    leaves = [hidden.requires_grad_()] + ([weight.requires_grad_()] if trained_head else [])
    made, saved = footprint(lambda: token_logprobs(hidden, weight, ids, 0.9, chunk)[0], leaves)
    assert made <= max(chunk * v, m * d, v * d)
    assert saved <= (m * d + v * d + 2 * m if trained_head else m * d)
    made, saved = footprint(lambda: whole(hidden, weight, ids, 0.9)[0], leaves)  # the probe does see a full matrix
    assert made == m * v
    assert saved >= m * v


def test_no_grad_saves_nothing_and_forms_no_gradient():
    hidden, weight, ids, _, _ = problem()
    hidden.requires_grad_()
    with torch.no_grad():
        logp, _ = token_logprobs(hidden, weight, ids)
    assert not logp.requires_grad
    assert not token_logprobs(hidden.detach(), weight, ids)[0].requires_grad
    assert_close(logp, whole(hidden, weight, ids)[0].detach())


def test_leading_shape_empty_input_and_second_backward():
    hidden, weight, ids, _, _ = problem(m=24)
    hidden.requires_grad_()
    logp, entropy = token_logprobs(hidden.view(2, 3, 4, D), weight, ids.view(2, 3, 4), chunk=5)
    assert logp.shape == entropy.shape == (2, 3, 4)
    assert_close(logp.reshape(-1), whole(hidden, weight, ids)[0])
    once, twice = (torch.autograd.grad(logp.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(once, twice)
    assert token_logprobs(hidden[:0], weight, ids[:0])[0].shape == (0,)


def test_large_logits_stay_exact():
    """A confident policy: log-prob and gradient of probabilities near 1 and near 0, in float32."""
    weight = torch.tensor([[40.0], [0.0], [-40.0]])
    for target, expected in [(0, 0.0), (1, -40.0), (2, -80.0)]:
        hidden = torch.ones(1, 1, requires_grad=True)
        logp, entropy = token_logprobs(hidden, weight, torch.tensor([target]))
        logp.sum().backward()
        assert logp.item() == pytest.approx(expected, rel=1e-6)
        assert entropy.item() == pytest.approx(40 * math.exp(-40), rel=1e-3)
        assert hidden.grad.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.zeros(3, dtype=torch.int64)}, r"hidden \[2, 4\], head_weight \[5, 4\], ids \[3\] do not match"),
        ({"head_weight": torch.zeros(5, 3)}, r"head_weight \[5, 3\]"),
        ({"bias": torch.zeros(4)}, r"bias has shape \[4\]; allowed: \[V\] = \[5\]"),
        ({"temperature": 0.0}, r"temperature=0\.0; allowed: more than 0"),
        ({"chunk": 0}, "chunk=0; allowed: 1 or more"),
    ],
)
def test_errors_say_what_is_allowed(change, message):
    inputs = {"hidden": torch.zeros(2, 4), "head_weight": torch.zeros(5, 4), "ids": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        token_logprobs(**{**inputs, **change})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("trained_head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(trained_head, dtype):
    hidden, weight, ids, upstream, _ = problem(dtype=dtype, m=64, d=64, v=999)
    results = []
    for device in ("cpu", "cuda"):
        leaves = [hidden.to(device).requires_grad_(), weight.to(device).requires_grad_(trained_head)]
        logp, entropy = token_logprobs(*leaves, ids.to(device), 0.9, 16)
        grads = torch.autograd.grad((logp * upstream.to(device)).sum(), leaves if trained_head else leaves[:1])
        results.append([t.detach().cpu().float() for t in (logp, entropy, *grads)])
    for cpu, cuda in zip(*results, strict=True):
        assert_close(cuda, cpu, atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=2e-2)


@pytest.mark.parametrize("trained_head", [False, True])
def test_log_probs_alone_are_the_same_to_the_last_bit(trained_head):
    hidden, weight, ids, upstream, bias = problem(bias=True)
    found = []
    for function in (token_logprobs, selected_logprobs):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained_head)]
        result = function(*leaves, ids, 0.7, 8, torch.tensor([3]), bias)
        logp = result if isinstance(result, torch.Tensor) else result[0]
        found.append([logp, *torch.autograd.grad((logp * upstream)[ids != 3].sum(), leaves[: 1 + trained_head])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
