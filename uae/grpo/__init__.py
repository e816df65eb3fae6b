"""Group-relative policy optimisation in plain torch: advantages, the clipped loss and memory-lean log-probs."""

from uae.grpo.advantages import group_advantages, zero_variance_share
from uae.grpo.logprobs import logits, selected_logprobs, token_logprobs
from uae.grpo.loss import GRPOLoss, LossTerms

__all__ = ["GRPOLoss", "LossTerms", "group_advantages", "logits", "selected_logprobs", "token_logprobs", "zero_variance_share"]
