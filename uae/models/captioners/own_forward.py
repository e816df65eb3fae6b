"""A captioner compared with its model's own forward pass, once, when it is loaded.

Sampler and log-probs compute logits from final hidden states, without the model's own output head code. A model that does more
there than its last layer would be another policy than the released one, with a ratio of exactly one. So what the model does is
found out here by a few tokens of text, and a model that does something unknown is refused.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from uae.grpo import LogitRule, OutputLayer
from uae.models.captioners.policy import CaptionPolicy, VLMContext
from uae.models.captioners.trunk import has_trunk, inner, text_decoder

KEY = "model.init_args.system.init_args.captioner"
FACTORS = ("logits_scaling", "logit_scale", "output_multiplier", "lm_head_multiplier")  # names in configurations
LOUD = 40.0  # largest size of the compared outputs of the last layer: more than the usual caps, so that a cap shows
EXACT, ROUNDED = 1e-4, 0.03  # share of the largest logit by which logits may differ, in float32 and in 16 bits
NATS = {True: 1e-2, False: 0.5}  # mean difference of log-probs that a continued cache may make, in float32 and in 16 bits


def adopt_logits(policy: CaptionPolicy, ids: list[int]) -> None:
    """Find out how the model makes logits, have the policy do the same, and compare both with a plain forward pass.

    A model without values (on the meta device) is left as it is.

    Args:
        policy: The policy, whose ``rule`` is set.
        ids: A few tokens of text, at least 4.

    Raises:
        ValueError: The model's logits are none that the policy can have, a continued cache gives others, or a pass fails.
    """
    if policy.banned_ids.is_meta or any(weight.is_meta for weight in policy.parameters()):
        return
    ids_1L = torch.tensor([ids], device=policy.banned_ids.device)
    try:
        with torch.no_grad(), torch.autocast(ids_1L.device.type, enabled=False):
            policy.rule = _rule(policy.base, ids_1L)
            _check_continuation(policy, ids_1L)
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError) as error:
        name, said = type(policy.base).__name__, f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
        if not ids_1L.is_cuda and torch.cuda.is_available():
            warnings.warn(f"{name} does not run on the CPU ({said}), so its cache is not compared with one pass", stacklevel=2)
            return
        raise ValueError(
            f"{name} cannot read a few tokens of text ({said}); set {KEY} to a model of another class, or install another transformers"
        ) from error


def _rule(model: Any, ids_1L: Tensor) -> LogitRule:
    """The rule by which a model's logits follow from its last layer: the candidate that comes closest.

    The model's own code is given hidden states in place of those that its layers would compute. They are loud, because caps and
    rounding would hide in small logits.
    """
    head, noise = model.get_output_embeddings(), torch.Generator().manual_seed(0)
    bias_V = getattr(head, "bias", None)
    hidden_LD = torch.randn(ids_1L.shape[1], head.weight.shape[1], generator=noise).to(head.weight)
    layer = OutputLayer(head.weight, bias_V=bias_V, keep=False)
    hidden_LD = hidden_LD * (LOUD / layer(hidden_LD).abs().max()).to(hidden_LD.dtype)
    own_LV, plain_LV = _own_logits(model, ids_1L, hidden_LD), layer(hidden_LD)
    largest = float(own_LV.abs().max())

    def error(rule: LogitRule) -> float:
        ours_LV = rule.apply(plain_LV[:, : own_LV.shape[1]].clone())
        return float((ours_LV - own_LV).abs().max()) / largest

    best = min(_candidates(model.config), key=error)
    allowed = EXACT if head.weight.dtype.itemsize > 2 else ROUNDED
    if not error(best) <= allowed:
        raise ValueError(
            f"the logits of {type(model).__name__} are not those of its last layer (off by {error(best):.2g} of the largest one), and "
            f"no known scale or cap explains them; set {KEY} to a model of another class"
        )
    return best


class _States:
    """Final hidden states ``[1, L, D]`` as the output of a model without its head; all else that an output may have is None."""

    def __init__(self, hidden_1LD: Tensor) -> None:
        self.last_hidden_state = hidden_1LD

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, place: int) -> Tensor:
        return self.last_hidden_state


def _own_logits(model: Any, ids_1L: Tensor, hidden_LD: Tensor) -> Tensor:
    """The logits ``[L, V]``, in float32, that a model's own code makes of hidden states."""
    layers = model.model if has_trunk(model) else text_decoder(model)
    before = layers.__dict__.get("forward")  # some libraries set their own
    layers.forward = lambda *args, **kwargs: _States(hidden_LD[None])
    try:
        own_1LV = model(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), use_cache=False).logits
    finally:
        del layers.forward
        if before is not None:
            layers.forward = before
    return own_1LV[0].float()


def _candidates(config: Any) -> Iterator[LogitRule]:
    """Rules that the numbers in a configuration allow, the simplest first."""
    known = [config.get_text_config(decoder=True), config]
    scales, caps = [1.0], [None]
    for settings in known:
        factors = [getattr(settings, name, None) for name in FACTORS]
        scales += [scale for factor in factors if factor for scale in (float(factor), 1 / float(factor))]
        caps += [cap for cap in [getattr(settings, "final_logit_softcapping", None)] if cap]
    yield from (LogitRule(scale, cap) for scale in dict.fromkeys(scales) for cap in dict.fromkeys(caps))


def _check_continuation(policy: CaptionPolicy, ids_1L: Tensor) -> None:
    """Compare log-probs behind a prompt's cache with those of one plain pass over all tokens."""
    if getattr(policy.base.config.get_text_config(decoder=True), "use_bidirectional_attention", None) is True:
        return  # without an image, one pass would take the whole text for a prompt, whose tokens look both ways (PaliGemma)
    network = inner(policy.base)
    if hasattr(network, "rope_deltas"):
        network.rope_deltas = None  # of the last prompt with an image, which a text without one would be counted on from
    half, rule = ids_1L.shape[1] // 2, policy.rule
    plain_LV = policy.base(input_ids=ids_1L, attention_mask=torch.ones_like(ids_1L), use_cache=False).logits[0].float()
    asked_T = ids_1L[0, half:]
    expected_T = plain_LV[half - 1 : -1].log_softmax(-1).gather(1, asked_T[:, None])[:, 0]
    prompt = {"input_ids": ids_1L[:, :half], "attention_mask": torch.ones_like(ids_1L[:, :half])}
    prefix = policy.prefill(VLMContext(prompt)).expand(1)
    states_1TD = torch.cat([prefix.hidden_ND[:, None], policy.advance(prefix, ids_1L[:, half:-1])], dim=1)
    head = policy.base.get_output_embeddings()
    ours_TV = OutputLayer(head.weight, bias_V=getattr(head, "bias", None), rule=rule, keep=False)(states_1TD[0])
    found_T = ours_TV[:, : plain_LV.shape[1]].log_softmax(-1).gather(1, asked_T[:, None])[:, 0]
    off = float((found_T - expected_T).abs().mean())
    if not off <= NATS[head.weight.dtype.itemsize > 2]:
        raise ValueError(
            f"{type(policy.base).__name__} gives other log-probs behind the cache of a prompt than in one pass (by {off:.2g} nats), "
            f"so captions cannot share a prompt; set {KEY} to a model of another class"
        )
