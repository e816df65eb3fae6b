"""Group-relative policy optimisation in plain torch: advantages, the policy loss and memory-lean log-probs."""

from uae.grpo.advantages import group_advantages, zero_variance_share
from uae.grpo.importance import Correction, effective_sample_size, importance_weights
from uae.grpo.logprobs import selected_logprobs, token_logprobs
from uae.grpo.loss import GRPOLoss, LossTerms, entropy_threshold
from uae.grpo.output_layer import LogitRule, OutputLayer

__all__ = [
    "Correction", "GRPOLoss", "LogitRule", "LossTerms", "OutputLayer", "effective_sample_size", "entropy_threshold",
    "group_advantages", "importance_weights", "selected_logprobs", "token_logprobs", "zero_variance_share",
]  # fmt: skip
