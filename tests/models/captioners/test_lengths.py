"""Captions of similar length share a pass of the update: less is computed for padding, and no number changes."""

import pytest
import torch

from tests.models import families
from uae.models.captioners import policy as caption_policy
from uae.models.captioners.policy import CaptionPolicy
from uae.models.finetune import Full, LoRA
from uae.types import Sampling


def gradients(captioner, rollout):
    """Log-probs and their gradients by name."""
    captioner.learner.network.zero_grad()
    logp_NT = captioner.logprobs(rollout)
    weight_NT = torch.randn(logp_NT.shape, generator=torch.Generator().manual_seed(0))
    (logp_NT * weight_NT).sum().backward()
    return logp_NT.detach(), {n: p.grad for n, p in captioner.learner.network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", families.FAMILIES)
@pytest.mark.parametrize("finetune", [LoRA(rank=2), Full(".*")], ids=["lora", "full"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_log_probs_and_gradients_are_those_of_one_pass(family, finetune, recompute, monkeypatch):
    linear = family not in families.FULL_ATTENTION  # keeps one pass; its layers cannot be recomputed
    if linear and recompute:
        return
    captioner = families.create(family)
    finetune.attach(captioner.learner, keep_reference=False)
    captioner.learner.network.gradient_checkpointing = recompute
    images = [torch.rand(3, 24, width, generator=torch.Generator().manual_seed(0)) for width in (24, 40, 24)]
    rollout = captioner.sample(captioner.prepare(images), 8, Sampling(1.0, 60), range(24))
    fed, honest = [], CaptionPolicy.advance
    monkeypatch.setattr(CaptionPolicy, "advance", lambda *a: fed.append(a[2].numel()) or honest(*a))
    parts = gradients(captioner, rollout)
    in_parts = fed.copy()
    monkeypatch.setattr(caption_policy, "FEWEST", 24)
    fed.clear()
    whole = gradients(captioner, rollout)
    assert len(fed) == 1
    assert in_parts == fed if linear else sum(in_parts) < 0.8 * sum(fed)
    torch.testing.assert_close(parts[0], whole[0], atol=1e-5, rtol=0)
    scale = max(gradient.abs().max() for gradient in whole[1].values())
    for name, gradient in whole[1].items():
        torch.testing.assert_close(parts[1][name], gradient, atol=1e-5 * float(scale), rtol=1e-4)
