"""The clipped, KL-regularised policy loss, for caption tokens, image tokens and SDE steps alike.

Notation: A advantage, m mask, ratio = exp(logp - old_logp), d = ref_logp - logp. Per token

    policy = -min( min(ratio, delta) * A,  clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A )
    loss   = policy + beta * kl

and then one of four aggregations. Sources: GRPO (arXiv 2402.03300), DAPO (2503.14476: asymmetric clipping, token mean
over the whole batch), Dr. GRPO (2503.20783: constant length), GSPO (2507.18071: one ratio per sequence), INTELLECT-2
(2505.07291: delta), http://joschu.net/blog/kl-approx.html (k1, k2, k3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

KL = Literal["k1", "k2", "k3"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Importance = Literal["token", "sequence"]


@dataclass(frozen=True)
class LossTerms:
    """The loss and what to log about it: 0-d tensors, all but ``loss`` detached. ``loss = policy + beta * kl``."""

    loss: Tensor  # with gradient
    policy: Tensor  # clipped policy part, aggregated like the loss
    kl: Tensor  # KL to the reference in nats, aggregated like the loss; 0 when beta is 0
    clip_fraction: Tensor  # share of unmasked tokens in [0, 1] whose gradient the clipping removes
    ratio_mean: Tensor  # over unmasked tokens; 1 on-policy, 0 when everything is masked
    ratio_max: Tensor  # largest ratio of an unmasked token; 0 when everything is masked


@dataclass(frozen=True)
class GRPOLoss:
    """Clipped group-relative policy loss.

    Aggregations of the token losses, over N rows of T tokens:

    * ``grpo``: mean over rows of each row's token mean (an empty row counts as 0).
    * ``bnpo``: token mean. With a ``normalizer``, token sum over it.
    * ``dapo``: token sum over the ``normalizer``. Without one, the local token mean.
    * ``dr_grpo``: token sum over N * max_tokens.

    ``normalizer`` is the number of unmasked tokens of the whole optimiser window (all micro-batches, all ranks), so
    that the *sum* of the micro-batch losses is the window's loss whatever the split; a trainer that averages over M
    micro-batches and W ranks must multiply by M * W. ``grpo`` and ``dr_grpo`` ignore it: for them the window's loss is
    the *mean* over equal micro-batches.

    The KL has the gradient of its formula, taken at the sampled tokens: k1 pushes every log-prob with weight 1 (zero
    on average, so it only measures), k2 with -d, k3 with 1 - exp(d). The ratio does not weight it.

    Args:
        epsilon_low: How far below 1 the ratio may go, >= 0.
        epsilon_high: How far above 1 the ratio may go, >= 0.
        beta: Weight of the KL to the reference, >= 0. 0 needs no reference.
        kl: Estimator with d = ref_logp - logp: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
        aggregation: From token losses to one number, see above.
        importance: ``token`` has one ratio per token, ``sequence`` one per row: exp of the row's mean log-ratio
            (GSPO), through which the gradient flows.
        delta: Caps the unclipped ratio from above, > 1: bounds the loss of bad samples that became likely. None is no
            cap.
        max_tokens: Length that ``dr_grpo`` divides by, usually sampling.max_tokens. The others ignore it.

    Raises:
        ValueError: A value outside its range, or dr_grpo without max_tokens.
    """

    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    kl: KL = "k3"
    aggregation: Aggregation = "grpo"
    importance: Importance = "token"
    delta: float | None = None
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range, in one line."""
        for key, allowed in (("kl", KL), ("aggregation", Aggregation), ("importance", Importance)):
            if getattr(self, key) not in get_args(allowed):
                raise ValueError(f"loss.{key}={getattr(self, key)!r}; allowed: {', '.join(get_args(allowed))}")
        for key in ("epsilon_low", "epsilon_high", "beta"):
            if not getattr(self, key) >= 0:
                raise ValueError(f"loss.{key}={getattr(self, key)}; allowed: 0 or more")
        if self.delta is not None and not self.delta > 1:
            raise ValueError(f"loss.delta={self.delta} caps the ratio at or below 1; allowed: more than 1, or null")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"loss.max_tokens={self.max_tokens}; allowed: 1 or more")
        if self.aggregation == "dr_grpo" and self.max_tokens is None:
            raise ValueError(
                "loss.aggregation=dr_grpo needs loss.max_tokens, the length it divides by: sampling.max_tokens"
            )

    @property
    def window(self) -> Literal["none", "local", "global"]:
        """Whose tokens of an optimizer window the loss divides by: nobody's, those of this process, or those of all."""
        windows: dict[Aggregation, Literal["local", "global"]] = {"bnpo": "local", "dapo": "global"}
        return windows.get(self.aggregation, "none")

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logp: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> LossTerms:
        """Loss of N rows of T actions. Masked positions may hold anything, inf and NaN included.

        Args:
            logp: ``[N, T]`` log-probs in nats under the current weights, with gradient.
            old_logp: ``[N, T]`` log-probs under the weights that sampled (``logp.detach()`` on-policy); constants.
            advantages: ``[N]``, ``[N, 1]`` or ``[N, T]``; no gradient flows.
            mask: ``[N, T]``, 1 (or True) where the action counts, the end-of-sequence token included.
            ref_logp: ``[N, T]`` log-probs under the reference; needed when beta > 0. No gradient flows.
            normalizer: Unmasked tokens of the whole optimiser window, for ``dapo`` and ``bnpo``.

        Raises:
            ValueError: Shapes that do not match, or beta > 0 without ref_logp.
        """
        _check_shapes(logp, old_logp, advantages, mask, ref_logp)
        valid_NT = mask.bool()
        # Filling comes first: 0 * inf is NaN, so masking a computed loss would be too late, forward and backward.
        logp_NT = _filled(logp, valid_NT)
        ratio_NT = self._ratio(logp_NT - _filled(old_logp.detach(), valid_NT), valid_NT)
        advantage_NT = advantages.detach().reshape(len(logp), -1).expand_as(logp)
        advantage_NT = _filled(advantage_NT, valid_NT)
        policy = self._aggregate(self._policy(ratio_NT, advantage_NT), valid_NT, normalizer)
        loss, kl = policy, torch.zeros_like(policy)
        if self.beta > 0:
            if ref_logp is None:
                raise ValueError(
                    f"loss.beta={self.beta} needs the reference's log-probs: pass ref_logp or set loss.beta=0"
                )
            kl = self._aggregate(self._kl(_filled(ref_logp.detach(), valid_NT) - logp_NT), valid_NT, normalizer)
            loss = policy + self.beta * kl
        return LossTerms(loss, policy.detach(), kl.detach(), *self._metrics(ratio_NT.detach(), advantage_NT, valid_NT))

    def _ratio(self, log_ratio_NT: Tensor, valid_NT: Tensor) -> Tensor:
        if self.importance == "sequence":
            mean_N1 = log_ratio_NT.sum(1, keepdim=True) / valid_NT.sum(1, keepdim=True).clamp(min=1)
            log_ratio_NT = mean_N1.expand_as(log_ratio_NT)
        return log_ratio_NT.exp()

    def _policy(self, ratio_NT: Tensor, advantage_NT: Tensor) -> Tensor:
        clipped_NT = ratio_NT.clamp(1 - self.epsilon_low, 1 + self.epsilon_high) * advantage_NT
        capped_NT = (ratio_NT if self.delta is None else ratio_NT.clamp(max=self.delta)) * advantage_NT
        # The minimum. A tie takes the gradient of the ratio, so that on-policy it is REINFORCE even when epsilon is 0.
        return -torch.where(capped_NT <= clipped_NT, capped_NT, clipped_NT)

    def _kl(self, d_NT: Tensor) -> Tensor:
        if self.kl == "k1":
            return -d_NT
        if self.kl == "k2":
            return d_NT.square() / 2
        return d_NT.exp() - d_NT - 1

    def _aggregate(self, terms_NT: Tensor, valid_NT: Tensor, normalizer: Tensor | float | None) -> Tensor:
        total_N = terms_NT.sum(1)  # masked terms are 0, as their inputs are
        tokens_N = valid_NT.sum(1)
        if self.aggregation == "grpo":
            return (total_N / tokens_N.clamp(min=1)).mean()
        if self.aggregation == "dr_grpo":
            assert self.max_tokens is not None  # __post_init__ has refused the rest
            return total_N.sum() / (len(total_N) * self.max_tokens)
        if normalizer is None:
            normalizer = tokens_N.sum()
        return total_N.sum() / torch.as_tensor(normalizer).clamp(min=1)

    def _metrics(self, ratio_NT: Tensor, advantage_NT: Tensor, valid_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clip fraction, mean and maximum of the ratio, without a wait for the device."""
        low_NT = (ratio_NT < 1 - self.epsilon_low) & (advantage_NT < 0)
        high_NT = (ratio_NT > 1 + self.epsilon_high) & (advantage_NT > 0)
        ratio_NT = ratio_NT.masked_fill(~valid_NT, 0.0)
        tokens = valid_NT.sum().clamp(min=1)
        clipped = ((low_NT | high_NT) & valid_NT).to(ratio_NT.dtype).sum()
        return clipped / tokens, ratio_NT.sum() / tokens, ratio_NT.amax()


def _filled(values_NT: Tensor, valid_NT: Tensor) -> Tensor:
    """At least float32, and 0 where masked: there neither the value nor the gradient depends on what was there."""
    dtype = torch.promote_types(values_NT.dtype, torch.float32)
    return values_NT.to(dtype).masked_fill(~valid_NT, 0.0)


def _check_shapes(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, ref_logp: Tensor | None) -> None:
    if logp.dim() != 2 or 0 in logp.shape:
        raise ValueError(f"logp has shape {list(logp.shape)}; allowed: [N, T] with N >= 1 and T >= 1")
    for name, tensor in (("old_logp", old_logp), ("mask", mask), ("ref_logp", ref_logp)):
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; allowed: that of logp, {list(logp.shape)}")
    rows, tokens = logp.shape
    if list(advantages.shape) not in ([rows], [rows, 1], [rows, tokens]):
        raise ValueError(
            f"advantages have shape {list(advantages.shape)}; allowed: [{rows}], [{rows}, 1] or [{rows}, {tokens}]; "
            "flatten advantage_BG with reshape(-1)"
        )
