"""The clipped policy loss of GRPO with a KL term. It is the same for caption tokens, image tokens and SDE steps.

With the advantage A, ratio = exp(logp - old_logp) and d = ref_logp - logp, every token has the loss

    policy = -min( min(ratio, delta) * A,  clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A )
    loss   = policy + beta * kl(d)

and one of four aggregations makes one number of the tokens' losses. Sources: GRPO (arXiv 2402.03300, equation 3), DAPO
(2503.14476: two clip ranges, mean over all tokens of a batch), Dr. GRPO (2503.20783: constant length), GSPO (2507.18071: one
ratio per sequence), INTELLECT-2 (2505.07291: delta), and http://joschu.net/blog/kl-approx.html for k1, k2 and k3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jsonargparse import set_parsing_settings
from torch import Tensor

KL = Literal["k1", "k2", "k3"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Importance = Literal["token", "sequence"]
Window = Literal["none", "local", "global"]


@dataclass(frozen=True)
class LossTerms:
    """The loss and what to log about it. All are tensors ``[]``, and all but ``loss`` are detached."""

    loss: Tensor  # policy + beta * kl, with gradient
    policy: Tensor  # the clipped part, aggregated like the loss
    kl: Tensor  # KL divergence to the reference in nats, aggregated like the loss; 0 if beta is 0
    clip_fraction: Tensor  # share of the unmasked tokens, in [0, 1], whose gradient is removed by clipping
    ratio_mean: Tensor  # mean ratio of the unmasked tokens; 1 on-policy, 0 if all tokens are masked
    ratio_max: Tensor  # largest ratio of an unmasked token; 0 if all tokens are masked


@dataclass(frozen=True)
class GRPOLoss:
    """The clipped policy loss of GRPO. A variant is a subclass, which a configuration names by its ``class_path``.

    The losses of N rows of T tokens are aggregated in one of four ways:

    * ``grpo``: the mean over the rows of every row's mean over its tokens; a row without tokens counts as 0.
    * ``bnpo``: the sum over all tokens, divided by the number of tokens in this process's optimizer window.
    * ``dapo``: the sum over all tokens, divided by the number of tokens in the optimizer window of all processes.
    * ``dr_grpo``: the sum over all tokens, divided by N * max_tokens.

    The optimizer window is all that one optimizer step learns from, that is, all micro-batches of gradient accumulation.
    `window` says whose window a loss divides by. Whoever calls the loss counts the tokens in it and passes their number as
    ``normalizer``. Then the *sum* of the losses of all micro-batches is the loss of the window, whatever its split; a
    trainer that averages over M micro-batches and W processes has to multiply by M * W. A loss whose window is "none"
    ignores the normalizer: the loss of its window is the *mean* of the losses of equal micro-batches.

    The KL term has the gradient of its formula at the sampled tokens, without a ratio: k1 moves every log-prob with weight
    1, which is zero on average, so that k1 only measures; k2 moves it with -d, and k3 with 1 - exp(d).

    Args:
        epsilon_low: How far the ratio may go below 1 before it is clipped, 0 or more.
        epsilon_high: How far the ratio may go above 1 before it is clipped, 0 or more.
        beta: Weight of the KL divergence to the reference, 0 or more. 0 needs no reference.
        kl: Estimator of the KL divergence in d = ref_logp - logp: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
        aggregation: How the losses of all tokens become one number, see above.
        importance: ``token`` gives every token its own ratio. ``sequence`` gives all tokens of a row the same one, exp of
            the row's mean log-ratio (GSPO), through which the gradient flows.
        delta: Upper limit of the ratio that is not clipped, more than 1. It bounds the loss of bad samples that have become
            likely. None sets no limit.
        max_tokens: Length in tokens that ``dr_grpo`` divides by, usually the longest that is sampled; 1 or more. The other
            aggregations ignore it.

    Raises:
        ValueError: A value is outside of its range, or dr_grpo is given no max_tokens.
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
        """Refuse values outside of their range."""
        for key, name, names in (
            ("kl", self.kl, KL), ("aggregation", self.aggregation, Aggregation), ("importance", self.importance, Importance),
        ):  # fmt: skip
            if name not in get_args(names):
                raise ValueError(_refusal(f"{key}={name!r}", ", ".join(get_args(names))))
        for key, value in (("epsilon_low", self.epsilon_low), ("epsilon_high", self.epsilon_high), ("beta", self.beta)):
            if not value >= 0:
                raise ValueError(_refusal(f"{key}={value}", "0 or more"))
        if self.delta is not None and not self.delta > 1:
            raise ValueError(_refusal(f"delta={self.delta}", "more than 1, or null for no limit of the ratio"))
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(_refusal(f"max_tokens={self.max_tokens}", "1 or more"))
        if self.aggregation == "dr_grpo" and self.max_tokens is None:
            raise ValueError(
                "model.init_args.loss.aggregation=dr_grpo needs loss.max_tokens, the length it divides by: set "
                "model.init_args.loss.max_tokens to model.init_args.sampling.max_tokens (image_loss has the same rules)"
            )

    @property
    def window(self) -> Window:
        """Whose optimizer window the loss divides by, so that its tokens have to be counted and passed as ``normalizer``.

        "local" is that of one process, "global" that of all processes together, and "none" is neither.
        """
        if self.aggregation == "bnpo":
            return "local"
        return "global" if self.aggregation == "dapo" else "none"

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logp: Tensor | None = None,
        normalizer: Tensor | float | None = None,
    ) -> LossTerms:
        """The loss of N rows of T actions (tokens or steps). Masked positions may hold anything, infinity and NaN included.

        Args:
            logp: Log-probs ``[N, T]`` in nats under the current weights, with gradient.
            old_logp: Log-probs ``[N, T]`` under the weights that sampled; no gradient flows. On-policy, ``logp.detach()``.
            advantages: Advantages ``[N]``, ``[N, 1]`` or ``[N, T]``; no gradient flows.
            mask: ``[N, T]``, 1 or True where an action counts, as the end-of-sequence token does, and 0 elsewhere.
            ref_logp: Log-probs ``[N, T]`` under the reference, needed if beta > 0; no gradient flows.
            normalizer: The number of unmasked tokens in the optimizer window, for losses that have a `window`. None takes
                the tokens of this call.

        Raises:
            ValueError: The shapes do not match, or beta > 0 and there is no ref_logp.
        """
        _check_shapes(logp, old_logp, advantages, mask, ref_logp)
        valid_NT = mask.bool()
        # Masked values are replaced first: 0 * inf is NaN, so masking the loss would come too late, also for the gradient.
        logp_NT = _filled(logp, valid_NT)
        ratio_NT = self.ratio(logp_NT - _filled(old_logp.detach(), valid_NT), valid_NT)
        advantage_NT = advantages.detach().reshape(len(logp), -1).expand_as(logp)
        advantage_NT = _filled(advantage_NT, valid_NT)
        policy = self.aggregate(self.clipped(ratio_NT, advantage_NT), valid_NT, normalizer)
        loss, kl = policy, torch.zeros_like(policy)
        if self.beta > 0:
            if ref_logp is None:
                raise ValueError(
                    f"loss.beta={self.beta} needs the reference's log-probs: pass ref_logp or set model.init_args.loss.beta=0"
                )
            kl = self.aggregate(self.divergence(_filled(ref_logp.detach(), valid_NT) - logp_NT), valid_NT, normalizer)
            loss = policy + self.beta * kl
        return LossTerms(loss, policy.detach(), kl.detach(), *self._metrics(ratio_NT.detach(), advantage_NT, valid_NT))

    def ratio(self, log_ratio_NT: Tensor, valid_NT: Tensor) -> Tensor:
        """The ratio ``[N, T]`` of every token, from logp - old_logp (0 where masked)."""
        if self.importance == "sequence":
            mean_N1 = log_ratio_NT.sum(1, keepdim=True) / valid_NT.sum(1, keepdim=True).clamp(min=1)
            log_ratio_NT = mean_N1.expand_as(log_ratio_NT)
        return log_ratio_NT.exp()

    def clipped(self, ratio_NT: Tensor, advantage_NT: Tensor) -> Tensor:
        """The policy loss ``[N, T]`` of every token."""
        clipped_NT = ratio_NT.clamp(1 - self.epsilon_low, 1 + self.epsilon_high) * advantage_NT
        capped_NT = (ratio_NT if self.delta is None else ratio_NT.clamp(max=self.delta)) * advantage_NT
        # This is the minimum. A tie takes the gradient of the ratio, so on-policy it is REINFORCE, even if epsilon is 0.
        return -torch.where(capped_NT <= clipped_NT, capped_NT, clipped_NT)

    def divergence(self, d_NT: Tensor) -> Tensor:
        """The estimate ``[N, T]`` of the KL divergence at every token, from ref_logp - logp."""
        if self.kl == "k1":
            return -d_NT
        if self.kl == "k2":
            return d_NT.square() / 2
        return d_NT.exp() - d_NT - 1

    def aggregate(self, terms_NT: Tensor, valid_NT: Tensor, normalizer: Tensor | float | None) -> Tensor:
        """One number ``[]`` from the terms of all tokens. A subclass that divides by other windows says so in `window`."""
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
        """Clip fraction, and mean and maximum of the ratio; none of them waits for the device."""
        low_NT = (ratio_NT < 1 - self.epsilon_low) & (advantage_NT < 0)
        high_NT = (ratio_NT > 1 + self.epsilon_high) & (advantage_NT > 0)
        ratio_NT = ratio_NT.masked_fill(~valid_NT, 0.0)
        tokens = valid_NT.sum().clamp(min=1)
        clipped = ((low_NT | high_NT) & valid_NT).to(ratio_NT.dtype).sum()
        return clipped / tokens, ratio_NT.sum() / tokens, ratio_NT.amax()


# jsonargparse takes no class_path of a subclass of a dataclass unless it is told to.
set_parsing_settings(subclasses_enabled=[GRPOLoss])


def _refusal(given: str, allowed: str) -> str:
    return f"model.init_args.loss.{given}; allowed: {allowed} (image_loss has the same rules)"


def _filled(values_NT: Tensor, valid_NT: Tensor) -> Tensor:
    """The values in float32 or wider, and 0 where masked, so that nothing depends on what was there."""
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
