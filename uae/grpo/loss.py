"""The policy loss of GRPO with a KL term. It is the same for caption tokens, image tokens and denoising steps.

With the advantage A, ratio = exp(logp - old_logp) and d = ref_logp - logp, every token has the loss

    policy = -min( min(ratio, delta) * A,  clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A )
    loss   = weight * (policy + beta * kl(d) - entropy_bonus * ratio * (-old_logp - entropy))

and one of four aggregations makes one number of the tokens' losses. Sources: GRPO (arXiv 2402.03300, equation 3), DAPO
(2503.14476: two clip ranges, mean over all tokens of a batch), Dr. GRPO (2503.20783: constant length), GSPO (2507.18071: one
ratio per sequence), INTELLECT-2 (2505.07291: delta), and http://joschu.net/blog/kl-approx.html for k1, k2 and k3. Other policy
terms are in `uae.grpo.surrogates`, and weights in `uae.grpo.importance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jsonargparse import set_parsing_settings
from torch import Tensor

from uae.grpo import surrogates

KL = Literal["k1", "k2", "k3"]
KLWeighting = Literal["none", "ratio"]
Aggregation = Literal["grpo", "bnpo", "dr_grpo", "dapo"]
Importance = Literal["token", "sequence", "sequence_token"]
Surrogate = Literal["clip", "cispo", "sapo"]
Window = Literal["none", "local", "global"]


@dataclass(frozen=True)
class LossTerms:
    """The loss and what to log about it. All are tensors ``[]``, and all but ``loss`` are detached."""

    loss: Tensor  # policy + beta * kl, and the entropy bonus, with gradient
    policy: Tensor  # the policy term, aggregated like the loss
    kl: Tensor  # KL divergence to the reference in nats, aggregated like the loss; 0 if beta is 0
    clip_fraction: Tensor  # share of the unmasked tokens, in [0, 1], whose gradient (cispo: weight) is limited; 0 for sapo
    ratio_mean: Tensor  # mean ratio of the unmasked tokens; 1 on-policy, 0 if all tokens are masked
    ratio_max: Tensor  # largest ratio of an unmasked token; 0 if all tokens are masked


@dataclass(frozen=True)
class GRPOLoss:
    """The policy loss of GRPO and its variants. A further variant is a subclass, which a configuration names by its ``class_path``.

    The losses of N rows of T tokens are aggregated in one of four ways:

    * ``grpo``: the mean over the rows of every row's mean over its tokens; a row without tokens counts as 0.
    * ``bnpo``: the sum over all tokens, divided by the number of tokens in this process's optimizer window.
    * ``dapo``: the sum over all tokens, divided by the number of tokens in the optimizer window of all processes.
    * ``dr_grpo``: the sum over all tokens, divided by N * max_tokens.

    The optimizer window is all that one optimizer step learns from, that is, all micro-batches of gradient accumulation.
    `window` says whose window a loss divides by. Whoever calls the loss counts the tokens in it and passes their number as
    ``normalizer``. Then the *sum* of the losses of all micro-batches is the loss of the window, whatever its split; a
    trainer that averages over M micro-batches and W processes has to multiply by M * W. A loss whose window is "none" divides by the
    rows of its call: the loss of its window is the *mean* of the losses of equal micro-batches. Where some rows are left out of the
    loss on purpose (all of their tokens masked), the number of the others in the window is passed to it as ``normalizer``, and the
    sum is the loss again.

    Without ``kl_weighting``, the KL term has the gradient of its formula at the sampled tokens: k1 moves every log-prob with weight
    1, which is zero on average, so that k1 only measures; k2 moves it with -d, and k3 with 1 - exp(d), which on-policy is the
    gradient of the *reverse* divergence, KL(reference, policy). With ``kl_weighting: ratio``, the estimate of every token is
    multiplied by the token's own ratio, through which a gradient flows, too. Then k1 and k3 have the gradient of
    KL(policy, reference) in expectation, also when the policy has moved since it sampled (arXiv 2512.02556, section 3.1).

    Args:
        epsilon_low: How far the ratio may go below 1 before it is clipped, 0 or more. Used by the surrogate ``clip`` only.
        epsilon_high: How far the ratio may go above 1 before it is clipped, 0 or more. For ``cispo``, a token's weight is at most
            1 + epsilon_high, and larger values are usual (4 in its paper). ``sapo`` does not use it.
        beta: Weight of the KL divergence to the reference, 0 or more. 0 needs no reference.
        kl: Estimator of the KL divergence in d = ref_logp - logp: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1.
        aggregation: How the losses of all tokens become one number, see above.
        importance: ``token`` gives every token its own ratio. ``sequence`` gives all tokens of a row the same one, exp of
            the row's mean log-ratio (GSPO), through which the gradient flows. ``sequence_token`` has the values of ``sequence``, and
            the gradient of each token's own log-prob (GSPO-token, arXiv 2507.18071, section 4.3), for advantages that differ
            within a row.
        delta: Upper limit of the ratio that is not clipped, more than 1. It bounds the loss of bad samples that have become
            likely. None sets no limit. Used by the surrogate ``clip`` only.
        max_tokens: Length in tokens that ``dr_grpo`` divides by, usually the longest that is sampled; 1 or more. The other
            aggregations ignore it.
        surrogate: The policy term, see `uae.grpo.surrogates`: ``clip`` (PPO, GRPO), ``cispo`` (the weight is limited, and every
            token keeps a gradient) or ``sapo`` (a soft gate).
        sapo_temperatures: tau of ``sapo`` for tokens with a positive advantage, and for all others; both more than 0.
        kl_weighting: ``none``, or ``ratio``, see above.
        entropy_bonus: Weight of the mean entropy of the policy, which is added to what is maximised; in nats per token, and aggregated
            like the loss. The gradient is estimated from the sampled tokens, ``ratio * (-old_logp - entropy)``: exact in
            expectation on-policy, with the entropy as its baseline. It needs the entropies.
        top_entropy: Share of the tokens that the policy term and the bonus learn from, those with the largest entropies; above 0 and
            at most 1 (arXiv 2506.01939 takes 0.2). What the loss divides by does not change. Below 1 it needs the entropies.

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
    surrogate: Surrogate = "clip"
    sapo_temperatures: tuple[float, float] = (1.0, 1.05)
    kl_weighting: KLWeighting = "none"
    entropy_bonus: float = 0.0
    top_entropy: float = 1.0

    def __post_init__(self) -> None:
        """Refuse values outside of their range."""
        for key, name, names in (
            ("kl", self.kl, KL), ("aggregation", self.aggregation, Aggregation), ("importance", self.importance, Importance),
            ("surrogate", self.surrogate, Surrogate), ("kl_weighting", self.kl_weighting, KLWeighting),
        ):  # fmt: skip
            if name not in get_args(names):
                raise ValueError(_refusal(f"{key}={name!r}", ", ".join(get_args(names))))
        self._check_numbers()
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(_refusal(f"max_tokens={self.max_tokens}", "1 or more"))
        if self.aggregation == "dr_grpo" and self.max_tokens is None:
            raise ValueError(
                "model.init_args.loss.aggregation=dr_grpo needs loss.max_tokens, the length it divides by: set "
                "model.init_args.loss.max_tokens to model.init_args.sampling.max_tokens (image_loss has the same rules)"
            )

    def _check_numbers(self) -> None:
        for key in ("epsilon_low", "epsilon_high", "beta", "entropy_bonus"):
            if not getattr(self, key) >= 0:
                raise ValueError(_refusal(f"{key}={getattr(self, key)}", "0 or more"))
        if self.delta is not None and not self.delta > 1:
            raise ValueError(_refusal(f"delta={self.delta}", "more than 1, or null for no limit of the ratio"))
        if self.delta is not None and self.surrogate != "clip":
            raise ValueError(_refusal(f"delta={self.delta} with surrogate={self.surrogate}", "null, as only surrogate=clip uses it"))
        if not min(self.sapo_temperatures) > 0:
            raise ValueError(_refusal(f"sapo_temperatures={list(self.sapo_temperatures)}", "two numbers above 0"))
        if not 0 < self.top_entropy <= 1:
            raise ValueError(_refusal(f"top_entropy={self.top_entropy}", "above 0 and at most 1"))

    @property
    def window(self) -> Window:
        """Whose optimizer window the loss divides by, so that its tokens have to be counted and passed as ``normalizer``.

        "local" is that of one process, "global" that of all processes together, and "none" is neither.
        """
        if self.aggregation == "bnpo":
            return "local"
        return "global" if self.aggregation == "dapo" else "none"

    @property
    def needs_entropy(self) -> bool:
        """Whether a call needs the entropies of the distributions that the tokens were drawn from."""
        return self.entropy_bonus > 0 or self.top_entropy < 1

    def __call__(
        self,
        logp: Tensor,
        old_logp: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logp: Tensor | None = None,
        normalizer: Tensor | float | None = None,
        weights: Tensor | None = None,
        entropy: Tensor | None = None,
        entropy_threshold: Tensor | float | None = None,
    ) -> LossTerms:
        """The loss of N rows of T actions (tokens or steps). Masked positions may hold anything, infinity and NaN included.

        Args:
            logp: Log-probs ``[N, T]`` in nats under the current weights, with gradient.
            old_logp: Log-probs ``[N, T]`` under the weights that sampled; no gradient flows. On-policy, ``logp.detach()``.
            advantages: Advantages ``[N]``, ``[N, 1]`` or ``[N, T]``; no gradient flows.
            mask: ``[N, T]``, 1 or True where an action counts, as the end-of-sequence token does, and 0 elsewhere.
            ref_logp: Log-probs ``[N, T]`` under the reference, needed if beta > 0; no gradient flows.
            normalizer: What the loss divides by: the number of unmasked tokens in the optimizer window for bnpo and dapo, and of rows
                with such tokens for grpo and dr_grpo. None takes the tokens, or all N rows, of this call.
            weights: Weights ``[N, T]`` of `uae.grpo.importance_weights`, which multiply every term of a token's loss; None is 1.
            entropy: Entropies ``[N, T]`` in nats of the distributions that the actions were drawn from; no gradient flows.
            entropy_threshold: Smallest entropy in nats of the tokens of ``top_entropy``, see `entropy_threshold`. None takes that of
                this call's tokens.

        Raises:
            ValueError: The shapes do not match, or beta, entropy_bonus or top_entropy ask for something that was not given.
        """
        _check_shapes(logp, old_logp, advantages, mask, ref_logp=ref_logp, weights=weights, entropy=entropy)
        valid_NT = mask.bool()
        # Masked values are replaced first: 0 * inf is NaN, so masking the loss would come too late, also for the gradient.
        logp_NT = _filled(logp, valid_NT)
        log_ratio_NT = logp_NT - _filled(old_logp.detach(), valid_NT)
        ratio_NT = self.ratio(log_ratio_NT, valid_NT)
        advantage_NT = advantages.detach().reshape(len(logp), -1).expand_as(logp)
        advantage_NT = _filled(advantage_NT, valid_NT)
        weight_NT = None if weights is None else _filled(weights.detach(), valid_NT)
        entropy_NT = None if entropy is None else _filled(entropy.detach(), valid_NT)

        terms_NT = self.policy(ratio_NT, advantage_NT, logp_NT)
        policy_weight_NT = self._selected(weight_NT, entropy_NT, entropy_threshold, valid_NT)
        policy = self.aggregate(_times(terms_NT, policy_weight_NT), valid_NT, normalizer)
        loss, kl = policy, torch.zeros_like(policy)
        if self.entropy_bonus > 0:
            surprise_NT = log_ratio_NT.exp() * (-_filled(old_logp.detach(), valid_NT) - _given(entropy_NT, "entropy_bonus"))
            loss = loss - self.entropy_bonus * self.aggregate(_times(surprise_NT, policy_weight_NT), valid_NT, normalizer)
        if self.beta > 0:
            if ref_logp is None:
                raise ValueError(
                    f"loss.beta={self.beta} needs the reference's log-probs: pass ref_logp or set model.init_args.loss.beta=0"
                )
            divergence_NT = self.divergence(_filled(ref_logp.detach(), valid_NT) - logp_NT)
            if self.kl_weighting == "ratio":
                divergence_NT = divergence_NT * log_ratio_NT.exp()
            kl = self.aggregate(_times(divergence_NT, weight_NT), valid_NT, normalizer)
            loss = loss + self.beta * kl
        return LossTerms(loss, policy.detach(), kl.detach(), *self._metrics(ratio_NT.detach(), advantage_NT, valid_NT))

    def ratio(self, log_ratio_NT: Tensor, valid_NT: Tensor) -> Tensor:
        """The ratio ``[N, T]`` of every token, from logp - old_logp (0 where masked)."""
        if self.importance == "token":
            return log_ratio_NT.exp()
        mean_N1 = log_ratio_NT.sum(1, keepdim=True) / valid_NT.sum(1, keepdim=True).clamp(min=1)
        if self.importance == "sequence_token":
            return (mean_N1.detach() + log_ratio_NT - log_ratio_NT.detach()).exp()
        return mean_N1.expand_as(log_ratio_NT).exp()

    def policy(self, ratio_NT: Tensor, advantage_NT: Tensor, logp_NT: Tensor) -> Tensor:
        """The policy term ``[N, T]`` of every token."""
        if self.surrogate == "cispo":
            return surrogates.cispo(ratio_NT, advantage_NT, logp_NT, self.epsilon_high)
        if self.surrogate == "sapo":
            return surrogates.sapo(ratio_NT, advantage_NT, *self.sapo_temperatures)
        return surrogates.clip(ratio_NT, advantage_NT, self.epsilon_low, self.epsilon_high, self.delta)

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
        if normalizer is None:
            normalizer = len(total_N) if self.window == "none" else tokens_N.sum()
        count = torch.as_tensor(normalizer).clamp(min=1)
        if self.aggregation == "grpo":
            return (total_N / tokens_N.clamp(min=1)).sum() / count
        if self.aggregation == "dr_grpo":
            assert self.max_tokens is not None  # __post_init__ has refused the rest
            return total_N.sum() / (count * self.max_tokens)
        return total_N.sum() / count

    def _selected(
        self, weight_NT: Tensor | None, entropy_NT: Tensor | None, threshold: Tensor | float | None, valid_NT: Tensor
    ) -> Tensor | None:
        """The weights of the policy term: 0 for tokens that are not among those with the largest entropies."""
        if self.top_entropy == 1:
            return weight_NT
        entropy_NT = _given(entropy_NT, "top_entropy")
        if threshold is None:
            threshold = entropy_threshold(entropy_NT, valid_NT, self.top_entropy)
        top_NT = (entropy_NT >= threshold).to(entropy_NT)
        return top_NT if weight_NT is None else weight_NT * top_NT

    def _metrics(self, ratio_NT: Tensor, advantage_NT: Tensor, valid_NT: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Clip fraction, and mean and maximum of the ratio; none of them waits for the device."""
        limited_NT = ratio_NT > 1 + self.epsilon_high
        if self.surrogate == "clip":
            low_NT = (ratio_NT < 1 - self.epsilon_low) & (advantage_NT < 0)
            limited_NT = low_NT | (limited_NT & (advantage_NT > 0))
        elif self.surrogate == "sapo":
            limited_NT = torch.zeros_like(limited_NT)
        ratio_NT = ratio_NT.masked_fill(~valid_NT, 0.0)
        tokens = valid_NT.sum().clamp(min=1)
        limited = (limited_NT & valid_NT).to(ratio_NT.dtype).sum()
        return limited / tokens, ratio_NT.sum() / tokens, ratio_NT.amax()


def entropy_threshold(entropy: Tensor, mask: Tensor, share: float) -> Tensor:
    """The entropy ``[]`` that this share of the unmasked tokens reach: their quantile ``1 - share``, interpolated linearly.

    Args:
        entropy: Entropies in nats, of any shape. All tokens that are compared have to be in it, of all mini-batches and processes.
        mask: 1 or True where a token counts, in the same shape.
        share: Share of the tokens, above 0 and at most 1.

    Returns:
        The threshold; infinity if all tokens are masked.
    """
    values = entropy.detach()[mask.bool()].to(torch.promote_types(entropy.dtype, torch.float32)).sort().values
    if not len(values):
        return values.new_tensor(torch.inf)
    place = (len(values) - 1) * (1 - share)  # torch.quantile does not take more than 2^24 values
    below = int(place)
    return torch.lerp(values[below], values[min(below + 1, len(values) - 1)], place - below)


# jsonargparse takes no class_path of a subclass of a dataclass unless it is told to.
set_parsing_settings(subclasses_enabled=[GRPOLoss])


def _refusal(given: str, allowed: str) -> str:
    return f"model.init_args.loss.{given}; allowed: {allowed} (image_loss has the same rules)"


def _filled(values_NT: Tensor, valid_NT: Tensor) -> Tensor:
    """The values in float32 or wider, and 0 where masked, so that nothing depends on what was there."""
    dtype = torch.promote_types(values_NT.dtype, torch.float32)
    return values_NT.to(dtype).masked_fill(~valid_NT, 0.0)


def _times(terms_NT: Tensor, weight_NT: Tensor | None) -> Tensor:
    return terms_NT if weight_NT is None else terms_NT * weight_NT


def _given(entropy_NT: Tensor | None, key: str) -> Tensor:
    if entropy_NT is None:
        raise ValueError(
            f"model.init_args.loss.{key} needs the entropies of the distributions that actions were drawn from, and there are none: "
            f"pass entropy, or set model.init_args.loss.{key} to its default (image_loss has the same rules)"
        )
    return entropy_NT


def _check_shapes(logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, **others: Tensor | None) -> None:
    if logp.dim() != 2 or 0 in logp.shape:
        raise ValueError(f"logp has shape {list(logp.shape)}; allowed: [N, T] with N >= 1 and T >= 1")
    for name, tensor in {"old_logp": old_logp, "mask": mask, **others}.items():
        if tensor is not None and tensor.shape != logp.shape:
            raise ValueError(f"{name} has shape {list(tensor.shape)}; allowed: that of logp, {list(logp.shape)}")
    rows, tokens = logp.shape
    if list(advantages.shape) not in ([rows], [rows, 1], [rows, tokens]):
        raise ValueError(
            f"advantages have shape {list(advantages.shape)}; allowed: [{rows}], [{rows}, 1] or [{rows}, {tokens}]; "
            "flatten advantage_BG with reshape(-1)"
        )
