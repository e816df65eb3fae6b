"""Independent references: the formulas of the papers as plain Python loops over floats. No tensor arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Case:
    """Inputs of a loss as nested lists, so that no reference can lean on tensor code."""

    logp: list[list[float]]
    old: list[list[float]]
    ref: list[list[float]]
    advantages: list[float]
    mask: list[list[float]]
    weights: list[list[float]]
    entropy: list[list[float]]

    def extras(self):
        """Float64 weights and entropies."""
        return tuple(torch.tensor(values, dtype=torch.float64) for values in (self.weights, self.entropy))

    def tensors(self):
        """Float64 ``logp`` (a leaf with gradient), old, advantages, mask, ref."""
        to = lambda values: torch.tensor(values, dtype=torch.float64)  # noqa: E731
        return to(self.logp).requires_grad_(), to(self.old), to(self.advantages), to(self.mask), to(self.ref)


def random_case(seed: int, rows: int = 6, tokens: int = 7, spread: float = 0.35, empty_row: bool = False) -> Case:
    """Ragged rows whose ratios land below, inside and above the usual clip range, with advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    old = -2 + 0.5 * draw(rows, tokens)
    logp, ref = old + spread * draw(rows, tokens), old + spread * draw(rows, tokens)
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator).tolist()
    lengths[0] = tokens
    if empty_row:
        lengths[1] = 0
    mask = [[1.0 if t < length else 0.0 for t in range(tokens)] for length in lengths]
    advantages = draw(rows).tolist()
    weights, entropy = (0.4 * draw(rows, tokens)).exp(), 2 * torch.rand(rows, tokens, generator=generator, dtype=torch.float64)
    return Case(logp.tolist(), old.tolist(), ref.tolist(), advantages, mask, weights.tolist(), entropy.tolist())


def loss_and_gradient(
    case: Case, *, eps_low=0.2, eps_high=0.2, beta=0.0, kl="k3", aggregation="grpo", importance="token", delta=None, max_tokens=None,
    normalizer=None, surrogate="clip", sapo_temperatures=(1.0, 1.05), kl_weighting="none", entropy_bonus=0.0, top_entropy=1.0,
    weighted=False,
):  # fmt: skip
    """Loss, d loss / d logp and the metrics, by hand. ``weighted`` multiplies by the weights of the case.

    Returns:
        dict of floats and, under "gradient", a nested list.
    """
    rows, tokens = len(case.logp), len(case.logp[0])
    counts = [sum(row) for row in case.mask]
    out = {"policy": 0.0, "kl": 0.0, "bonus": 0.0, "clipped": 0, "ratios": []}
    gradient = [[0.0] * tokens for _ in range(rows)]
    threshold = quantile([case.entropy[n][t] for n in range(rows) for t in range(tokens) if case.mask[n][t]], 1 - top_entropy)
    for n in range(rows):
        inside = [t for t in range(tokens) if case.mask[n][t]]
        own = {t: case.logp[n][t] - case.old[n][t] for t in inside}
        log_ratios = own
        if importance != "token" and inside:
            log_ratios = dict.fromkeys(inside, sum(own.values()) / len(inside))
        for t in inside:
            share = {
                "grpo": 1 / ((normalizer or rows) * counts[n]),
                "bnpo": 1 / (normalizer or sum(counts)),
                "dapo": 1 / (normalizer or sum(counts)),
                "dr_grpo": 1 / ((normalizer or rows) * max_tokens) if max_tokens else None,
            }[aggregation] * (case.weights[n][t] if weighted else 1)
            ratio, advantage = math.exp(log_ratios[t]), case.advantages[n]
            top = top_entropy == 1 or case.entropy[n][t] >= threshold
            out["ratios"].append(ratio)
            value, slope, limited = _token_term(
                surrogate, ratio, advantage, case.logp[n][t], eps_low, eps_high, delta, sapo_temperatures
            )
            out["clipped"] += limited
            out["policy"] += top * share * value
            if surrogate == "cispo":  # the weight is a constant, the log-prob is the token's own
                gradient[n][t] += top * share * slope
            elif importance in ("token", "sequence_token"):  # d ratio / d logp is the ratio itself
                gradient[n][t] += top * share * slope * ratio
            else:  # or ratio / T, for every token of the row
                for u in inside:
                    gradient[n][u] += top * share * slope * ratio / len(inside)
            bonus = top * share * entropy_bonus * math.exp(own[t]) * (-case.old[n][t] - case.entropy[n][t])
            out["bonus"] += bonus
            gradient[n][t] -= bonus
            if beta > 0:
                value, slope = _token_kl(case.ref[n][t] - case.logp[n][t], kl)
                if kl_weighting == "ratio":
                    value, slope = math.exp(own[t]) * value, math.exp(own[t]) * (value + slope)
                out["kl"] += share * value
                gradient[n][t] += share * beta * slope
    total = max(len(out["ratios"]), 1)
    return {
        "loss": out["policy"] + beta * out["kl"] - out["bonus"],
        "policy": out["policy"],
        "kl": out["kl"],
        "gradient": gradient,
        "clip_fraction": out["clipped"] / total,
        "ratio_mean": sum(out["ratios"]) / total,
        "ratio_max": max(out["ratios"], default=0.0),
    }


def quantile(values, q):
    """The q-quantile, interpolated linearly between the two values beside it."""
    if not values:
        return math.inf
    values, place = sorted(values), q * (len(values) - 1)
    below = math.floor(place)
    return values[below] + (place - below) * (values[min(below + 1, len(values) - 1)] - values[below])


def importance_weights(sampler, old, mask, level, mode, low, high):
    """Weights by hand: exp of the log-ratio, or of its mean over the row, limited."""
    weights = []
    for row_sampler, row_old, row_mask in zip(sampler, old, mask, strict=True):
        inside = [t for t, m in enumerate(row_mask) if m]
        gaps = {t: row_old[t] - row_sampler[t] for t in inside}
        if level == "sequence" and inside:
            gaps = dict.fromkeys(inside, sum(gaps.values()) / len(inside))
        row = [0.0] * len(row_mask)
        for t in inside:
            weight = math.exp(gaps[t])
            if mode == "truncate":
                weight = min(max(weight, low), high)
            elif not low <= weight <= high:
                weight = 0.0
            row[t] = weight
        weights.append(row)
    return weights


def _token_term(surrogate, ratio, advantage, logp, eps_low, eps_high, delta, sapo_temperatures):
    """Value of the token's policy term; its derivative in the ratio (cispo: in the log-prob); whether something was limited."""
    if surrogate == "cispo":
        weight = min(ratio, 1 + eps_high)
        return -weight * advantage * logp, -weight * advantage, ratio > 1 + eps_high
    if surrogate == "sapo":
        tau = sapo_temperatures[0] if advantage > 0 else sapo_temperatures[1]
        gate = 1 / (1 + math.exp(-tau * (ratio - 1)))
        return -4 / tau * gate * advantage, -4 * gate * (1 - gate) * advantage, False
    limited = (advantage < 0 and ratio < 1 - eps_low) or (advantage > 0 and ratio > 1 + eps_high)
    return *_token_policy(ratio, advantage, eps_low, eps_high, delta), limited


def _token_policy(ratio, advantage, eps_low, eps_high, delta):
    """Value of the token's clipped loss and its derivative in the ratio."""
    capped, capped_slope = (ratio, 1.0) if delta is None or ratio < delta else (delta, 0.0)
    if ratio < 1 - eps_low:
        clipped, clipped_slope = 1 - eps_low, 0.0
    elif ratio > 1 + eps_high:
        clipped, clipped_slope = 1 + eps_high, 0.0
    else:
        clipped, clipped_slope = ratio, 1.0
    if capped * advantage <= clipped * advantage:
        return -capped * advantage, -capped_slope * advantage
    return -clipped * advantage, -clipped_slope * advantage


def _token_kl(d, kl):
    """Value of the KL estimator and its derivative in logp, where d = ref - logp."""
    return {
        "k1": (-d, 1.0),
        "k2": (d * d / 2, -d),
        "k3": (math.exp(d) - d - 1, 1 - math.exp(d)),
    }[kl]


def advantages(rewards: list[list[float]], scale: str, eps: float, correction: int) -> list[list[float]]:
    """Group advantages by hand; NaN rewards are left out and get 0."""
    every = [r for group in rewards for r in group if not math.isnan(r)]
    result = []
    for group in rewards:
        scored = [r for r in group if not math.isnan(r)]
        mean = sum(scored) / len(scored) if scored else 0.0
        divisor = {"group": _std(scored, correction) + eps, "batch": None, "none": 1.0}[scale]
        if scale == "batch":
            divisor = _std(every, correction) + eps
        result.append([0.0 if math.isnan(r) or r == mean else (r - mean) / divisor for r in group])
    return result


def _std(values, correction):
    if not values:
        return 0.0
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - correction, 1))


def log_softmax(logits: list[float]) -> list[float]:
    """Log-softmax of one row; -inf logits allowed."""
    top = max(logits)
    total = math.log(sum(math.exp(z - top) for z in logits))
    return [z - top - total for z in logits]


def token_logprob(hidden, weight, target, temperature=1.0, banned=(), bias=None):
    """Log-prob and entropy of one token, and the gradient of the log-prob in hidden and weight.

    Returns:
        (logp, entropy, grad_hidden [D], grad_weight [V][D])
    """
    size = range(len(hidden))
    logits = []
    for v, row in enumerate(weight):
        logit = sum(row[i] * hidden[i] for i in size) + (bias[v] if bias else 0.0)
        logits.append(-math.inf if v in banned else logit / temperature)
    logp = log_softmax(logits)
    p = [math.exp(value) for value in logp]
    entropy = -sum(q * value for q, value in zip(p, logp, strict=True) if q > 0)
    slope = [0.0 if v in banned else (float(v == target) - p[v]) / temperature for v in range(len(p))]
    grad_hidden = [sum(slope[v] * weight[v][i] for v in range(len(p))) for i in size]
    grad_weight = [[slope[v] * hidden[i] for i in size] for v in range(len(p))]
    return logp[target], entropy, grad_hidden, grad_weight
