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
    return Case(logp.tolist(), old.tolist(), ref.tolist(), draw(rows).tolist(), mask)


def loss_and_gradient(
    case: Case,
    *,
    eps_low=0.2,
    eps_high=0.2,
    beta=0.0,
    kl="k3",
    aggregation="grpo",
    importance="token",
    delta=None,
    max_tokens=None,
    normalizer=None,
):
    """Loss, d loss / d logp and the metrics, by hand.

    Returns:
        dict with loss, policy, kl, clip_fraction, ratio_mean, ratio_max (floats) and gradient (nested list).
    """
    rows, tokens = len(case.logp), len(case.logp[0])
    counts = [sum(row) for row in case.mask]
    out = {"policy": 0.0, "kl": 0.0, "clipped": 0, "ratios": [], "gradient": [[0.0] * tokens for _ in range(rows)]}
    for n in range(rows):
        inside = [t for t in range(tokens) if case.mask[n][t]]
        log_ratios = {t: case.logp[n][t] - case.old[n][t] for t in inside}
        if importance == "sequence" and inside:
            log_ratios = dict.fromkeys(inside, sum(log_ratios.values()) / len(inside))
        for t in inside:
            weight = {
                "grpo": 1 / (rows * counts[n]),
                "bnpo": 1 / (normalizer or sum(counts)),
                "dapo": 1 / (normalizer or sum(counts)),
                "dr_grpo": 1 / (rows * max_tokens) if max_tokens else None,
            }[aggregation]
            ratio, advantage = math.exp(log_ratios[t]), case.advantages[n]
            value, slope = _token_policy(ratio, advantage, eps_low, eps_high, delta)
            out["policy"] += weight * value
            out["clipped"] += (advantage < 0 and ratio < 1 - eps_low) or (advantage > 0 and ratio > 1 + eps_high)
            out["ratios"].append(ratio)
            # d ratio / d logp is the ratio itself, or ratio / T for every token of the row
            if importance == "token":
                out["gradient"][n][t] += weight * slope * ratio
            else:
                for u in inside:
                    out["gradient"][n][u] += weight * slope * ratio / len(inside)
            if beta > 0:
                value, slope = _token_kl(case.ref[n][t] - case.logp[n][t], kl)
                out["kl"] += weight * value
                out["gradient"][n][t] += weight * beta * slope
    total = max(len(out["ratios"]), 1)
    return {
        "loss": out["policy"] + beta * out["kl"],
        "policy": out["policy"],
        "kl": out["kl"],
        "gradient": out["gradient"],
        "clip_fraction": out["clipped"] / total,
        "ratio_mean": sum(out["ratios"]) / total,
        "ratio_max": max(out["ratios"], default=0.0),
    }


def _token_policy(ratio, advantage, eps_low, eps_high, delta):
    """Value of the token's policy loss and its derivative in the ratio."""
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
