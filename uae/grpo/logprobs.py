"""Log-probs of given tokens, without ever holding the ``[M, V]`` matrix of logits of M tokens and V words.

The gradient of a token's log-prob with respect to its hidden state is ``(onehot - softmax) @ W / temperature``, a vector of
size D. If the head is frozen, the forward pass computes these vectors for one chunk of tokens after the other, and the
backward pass only scales them. If the head is trained, its own gradient needs the softmax again, so the backward pass
computes it once more, chunk by chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from uae.grpo.output_layer import AS_THEY_ARE, LogitRule, OutputLayer, accumulator, product

CHUNK = 256  # tokens whose logits exist at a time: two float32 [256, 151,936] are 0.3 GB, and larger products are no faster


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    banned: Tensor | None = None,
    bias: Tensor | None = None,
    rule: LogitRule = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """The log-probs of tokens under ``softmax(rule(hidden @ head_weight.T + bias) / temperature)``, and its entropy.

    The policy is the same here and in the sampler only if both use the same temperature and the same banned ids. The logits
    are those of `OutputLayer`, at least float32. The working memory is a few float32 tensors ``[chunk, V]``; besides, M tokens
    keep ``[M, D]`` for the backward pass.

    Args:
        hidden: Hidden states ``[..., D]``, each of which predicts the token at the same place in ``ids``.
        head_weight: Weight of the output layer, ``[V, D]``.
        ids: Tokens int64 ``[...]`` in [0, V).
        temperature: Number that divides the logits, more than 0.
        chunk: Number of tokens that are computed at a time, 1 or more. It changes memory and speed, not the result.
        banned: Tokens int64 that the policy never emits. Their logit is minus infinity, and so is their log-prob.
        bias: Bias of the output layer, ``[V]``, or None.
        rule: How the model turns the outputs of that layer into logits.

    Returns:
        The log-probs, which are differentiable once with respect to hidden, head_weight and bias, and the entropies, which
        are detached; both in nats and shaped like ``ids``.

    Raises:
        ValueError: The shapes do not match, the temperature is 0 or less, or chunk is less than 1.
    """
    logp_M, entropy_M = _scored(hidden, head_weight, ids, temperature, chunk, banned, bias, rule, entropy=True)
    return logp_M.view(ids.shape), entropy_M.view(ids.shape)


def selected_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    ids: Tensor,
    temperature: float = 1.0,
    chunk: int = CHUNK,
    banned: Tensor | None = None,
    bias: Tensor | None = None,
    rule: LogitRule = AS_THEY_ARE,
) -> Tensor:
    """The log-probs of `token_logprobs` without the entropies, which are then not computed."""
    logp_M, _ = _scored(hidden, head_weight, ids, temperature, chunk, banned, bias, rule, entropy=False)
    return logp_M.view(ids.shape)


def _scored(
    hidden: Tensor,
    head_weight: Tensor,
    ids: Tensor,
    temperature: float,
    chunk: int,
    banned: Tensor | None,
    bias: Tensor | None,
    rule: LogitRule,
    entropy: bool,
) -> tuple[Tensor, Tensor]:
    """Log-probs of M tokens, and their entropies (none where not asked for), by the function that fits what trains."""
    _check(hidden, head_weight, ids, temperature, chunk, bias)
    hidden_MD, ids_M = hidden.reshape(-1, hidden.shape[-1]), ids.reshape(-1)
    arguments = (hidden_MD, head_weight, bias, ids_M, banned, float(temperature), int(chunk), rule, entropy)
    if not torch.is_grad_enabled():
        return _score(*arguments)
    trained_head = head_weight.requires_grad or (bias is not None and bias.requires_grad)
    logp_M, entropy_M = (_TrainedHead if trained_head else _FrozenHead).apply(*arguments)
    return logp_M, entropy_M


class _FrozenHead(torch.autograd.Function):
    """Keeps ``d logp / d hidden`` of every token, ``[M, D]``, and nothing else. Torch gives ``ctx`` no type."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_M: Tensor,
        banned: Tensor | None,
        temperature: float,
        chunk: int,
        rule: LogitRule,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        slope_MD = None
        if ctx.needs_input_grad[0]:
            slope_MD = torch.empty_like(hidden_MD, dtype=accumulator(weight_VD))
        logp_M, entropy_M = _score(hidden_MD, weight_VD, bias_V, ids_M, banned, temperature, chunk, rule, entropy, slope_MD)
        ctx.save_for_backward(slope_MD)
        ctx.dtype = hidden_MD.dtype
        ctx.mark_non_differentiable(entropy_M)
        return logp_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        (slope_MD,) = ctx.saved_tensors
        # A masked token has an incoming gradient of 0 and must pass 0 on, even if its hidden state is NaN.
        grad_MD = (slope_MD * grad_M[:, None]).masked_fill(grad_M[:, None] == 0, 0.0)
        return grad_MD.to(ctx.dtype), *[None] * 8


class _TrainedHead(torch.autograd.Function):
    """Keeps its inputs; the backward pass computes the softmax of every chunk once more."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        ids_M: Tensor,
        banned: Tensor | None,
        temperature: float,
        chunk: int,
        rule: LogitRule,
        entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden_MD, weight_VD, bias_V, ids_M, banned)
        ctx.temperature, ctx.chunk, ctx.rule = temperature, chunk, rule
        logp_M, entropy_M = _score(hidden_MD, weight_VD, bias_V, ids_M, banned, temperature, chunk, rule, entropy)
        ctx.mark_non_differentiable(entropy_M)
        return logp_M, entropy_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_M: Tensor, _entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden_MD, weight_VD, bias_V, ids_M, banned = ctx.saved_tensors
        hidden_MD = hidden_MD.masked_fill(grad_M[:, None] == 0, 0.0)  # 0 * NaN is NaN
        grad_hidden_MD = torch.empty_like(hidden_MD)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=accumulator(weight_VD))
        grad_bias_V = torch.zeros_like(grad_weight_VD[:, 0])
        keep = _worth_keeping(weight_VD, len(ids_M), ctx.chunk)
        layer = OutputLayer(weight_VD, ctx.temperature, banned, bias_V, ctx.rule, keep)
        for start in range(0, len(ids_M), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            logits_CV = layer(hidden_MD[rows])
            softmax_CV = torch.softmax(logits_CV, 1, out=_overwritten(logits_CV, layer))
            slope_CV = _slope(softmax_CV, logits_CV, ids_M[rows], layer).mul_(grad_M[rows, None])
            del logits_CV, softmax_CV
            grad_hidden_MD[rows] = layer.gradient(slope_CV).to(hidden_MD.dtype)
            grad_weight_VD += product(slope_CV.t(), hidden_MD[rows].to(weight_VD.dtype))
            grad_bias_V += slope_CV.sum(0)
            del slope_CV  # before the next chunk is computed
        grad_bias = None if bias_V is None else grad_bias_V.to(bias_V.dtype)
        return grad_hidden_MD, grad_weight_VD.to(weight_VD.dtype), grad_bias, *[None] * 6


def _score(
    hidden_MD: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    ids_M: Tensor,
    banned: Tensor | None,
    temperature: float,
    chunk: int,
    rule: LogitRule,
    entropy: bool,
    slope_MD: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob and entropy of every token. If ``slope_MD`` is given, it is filled with ``d logp / d hidden``."""
    logp_M = hidden_MD.new_empty(len(ids_M), dtype=accumulator(weight_VD))
    entropy_M = torch.empty_like(logp_M) if entropy else logp_M.new_empty(0)
    layer = OutputLayer(weight_VD, temperature, banned, bias_V, rule, keep=_worth_keeping(weight_VD, len(ids_M), chunk))
    for start in range(0, len(ids_M), chunk):
        rows = slice(start, start + chunk)
        logits_CV = layer(hidden_MD[rows])
        logp_CV = torch.log_softmax(logits_CV, 1, out=_overwritten(logits_CV, layer))
        logp_M[rows] = logp_CV.gather(1, ids_M[rows, None]).squeeze(1)
        if entropy or slope_MD is not None:
            softmax_CV = logp_CV.exp_()
            if entropy:
                entropy_M[rows] = torch.special.entr(softmax_CV).sum(1)
            if slope_MD is not None:
                slope_MD[rows] = layer.gradient(_slope(softmax_CV, logits_CV, ids_M[rows], layer))
            del softmax_CV
        del logits_CV, logp_CV  # before the next chunk is computed
    return logp_M, entropy_M


def _worth_keeping(weight_VD: Tensor, tokens: int, chunk: int) -> bool:
    """Whether a reordered copy of the weight serves several chunks, and is no larger than the logits of two chunks."""
    return tokens > chunk and weight_VD.shape[1] <= 2 * chunk


def _overwritten(logits_CV: Tensor, layer: OutputLayer) -> Tensor | None:
    """The tensor that probabilities are written into: on a CPU the logits, to save memory; None makes a new one.

    With a cap, `LogitRule.chain` needs the logits afterwards.
    """
    return logits_CV if layer.rule.cap is None and logits_CV.device.type == "cpu" else None


def _slope(softmax_CV: Tensor, logits_CV: Tensor, ids_C: Tensor, layer: OutputLayer) -> Tensor:
    """``d logp / d (hidden @ W.T + bias)``, computed in place. It is 0 for banned tokens, whose logit is a constant."""
    slope_CV = softmax_CV.neg_()
    slope_CV.scatter_add_(1, ids_C[:, None], torch.ones_like(slope_CV[:, :1]))
    if layer.temperature != 1:
        slope_CV.div_(layer.temperature)
    slope_CV = layer.rule.chain(slope_CV, logits_CV, layer.temperature)
    return slope_CV if layer.banned is None else slope_CV.index_fill_(1, layer.banned, 0.0)


def _check(hidden: Tensor, head_weight: Tensor, ids: Tensor, temperature: float, chunk: int, bias: Tensor | None) -> None:
    if head_weight.dim() != 2 or hidden.shape[-1:] != head_weight.shape[1:] or hidden.shape[:-1] != ids.shape:
        shapes = f"hidden {list(hidden.shape)}, head_weight {list(head_weight.shape)}, ids {list(ids.shape)}"
        raise ValueError(f"{shapes} do not match; allowed: [..., D], [V, D] and [...]")
    if bias is not None and bias.shape != head_weight.shape[:1]:
        raise ValueError(f"bias has shape {list(bias.shape)}; allowed: [V] = {list(head_weight.shape[:1])}")
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}; allowed: more than 0 (greedy decoding: Sampling.policy_temperature)")
    if chunk < 1:
        raise ValueError(f"chunk={chunk}; allowed: 1 or more")
