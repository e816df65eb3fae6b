"""What a token's ratio and advantage are worth: the part of the policy loss in which published variants of GRPO differ.

All functions take ratios and advantages of one shape, here ``[N, T]``, and return the loss of every token, to be made small. At a
ratio of 1 all of them have the gradient of REINFORCE, ``-A`` per unit of log-prob.
"""

from __future__ import annotations

import torch
from torch import Tensor


def clip(ratio: Tensor, advantage: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """The surrogate of PPO and GRPO: the negative of the smaller one of ``min(r, delta) A`` and ``min(max(r, 1 - low), 1 + high) A``.

    A token whose ratio has left the range in the direction that its advantage asks for has no gradient any more.

    Args:
        ratio: Ratios of the current and the old policy, above 0.
        advantage: Advantages.
        low: How far the ratio may go below 1, 0 or more.
        high: How far the ratio may go above 1, 0 or more.
        delta: Upper limit of the ratio that is not clipped, more than 1; None sets no limit (INTELLECT-2, arXiv 2505.07291).
    """
    clipped = ratio.clamp(1 - low, 1 + high) * advantage
    capped = (ratio if delta is None else ratio.clamp(max=delta)) * advantage
    # This is the minimum. A tie takes the gradient of the ratio, so on-policy it is REINFORCE, even if low and high are 0.
    return -torch.where(capped <= clipped, capped, clipped)


def cispo(ratio: Tensor, advantage: Tensor, logp: Tensor, high: float) -> Tensor:
    """CISPO (MiniMax-M1, arXiv 2506.13585): ``-min(r, 1 + high) A logp``, with no gradient through the weight.

    Every token keeps a gradient; what is limited is its weight, from above only.

    Args:
        ratio: Ratios of the current and the old policy, above 0.
        advantage: Advantages.
        logp: Log-probs under the current policy, in nats.
        high: The weight is at most 1 + high.
    """
    return -ratio.detach().clamp(max=1 + high) * advantage * logp


def sapo(ratio: Tensor, advantage: Tensor, positive: float, negative: float) -> Tensor:
    """SAPO (arXiv 2511.20347): ``-(4 / tau) sigmoid(tau (r - 1)) A``, a soft gate in the place of clipping.

    The gradient is that of the ratio times ``4 s (1 - s)`` with ``s = sigmoid(tau (r - 1))``: 1 at a ratio of 1, and less on both
    sides of it, the faster the larger tau is.

    Args:
        ratio: Ratios of the current and the old policy, above 0.
        advantage: Advantages.
        positive: tau where the advantage is above 0; more than 0.
        negative: tau elsewhere; more than 0. A larger one makes updates away from bad samples more careful.
    """
    tau = torch.where(advantage > 0, ratio.new_tensor(positive), ratio.new_tensor(negative))
    return -4 / tau * (tau * (ratio - 1)).sigmoid() * advantage
