"""Recomputing in the backward pass: the same numbers, out of less memory."""

import copy
from dataclasses import replace

import pytest
import torch

from tests.models import families
from uae.models.finetune import Full, LoRA
from uae.models.prefix_cache import expand, prompt_cache
from uae.types import Sampling

ALL = r".*"


@pytest.fixture(scope="module")
def deep():
    """Captioners of four text layers, by family, and a rollout of each. Not to be changed."""
    cache = {}

    def create(family):
        if family not in cache:
            captioner = families.create(family, layers=4)
            generator = torch.Generator().manual_seed(0)
            images = [torch.rand(3, 24, width, generator=generator) for width in (24, 40)]
            rollout = captioner.sample(captioner.prepare(images), 3, Sampling(0.7, 8), range(6))
            cache[family] = captioner, rollout
        return cache[family]

    return create


def gradients(captioner, rollout):
    """Log-probs, their gradients by name, and bytes that are kept in between."""
    captioner.policy.zero_grad()
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor  # by storage: views of one are kept once
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in captioner.policy.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logp_NT = captioner.logprobs(rollout)
    size = sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in weights)
    del kept
    generator = torch.Generator().manual_seed(0)
    (logp_NT * torch.randn(logp_NT.shape, generator=generator)).sum().backward()
    return logp_NT.detach(), {n: p.grad for n, p in captioner.policy.named_parameters() if p.grad is not None}, size


@pytest.mark.parametrize("finetune", [LoRA(rank=2), LoRA(rank=2, target_modules="all-linear"), Full(ALL)])
@pytest.mark.parametrize("family", families.FULL_ATTENTION)
def test_checkpointing_changes_no_number_and_keeps_less(deep, family, finetune):
    captioner, rollout = deep(family)
    captioner = copy.deepcopy(captioner)
    finetune.attach(captioner, keep_reference=False)
    for name, parameter in captioner.policy.named_parameters():
        if "lora_B" in name:  # 0 at the start, which would hide the gradient of A
            torch.nn.init.normal_(parameter, 0, 0.1)
    plain_NT, plain, before = gradients(captioner, rollout)
    captioner.policy.gradient_checkpointing = True
    for train in (False, True):
        captioner.policy.train(train)
        logp_NT, recomputed, after = gradients(captioner, rollout)
        assert torch.equal(logp_NT, plain_NT)
        assert recomputed.keys() == plain.keys()
        assert len(plain) > 30
        for name, gradient in plain.items():
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-6, atol=1e-6 * float(gradient.abs().max()))
    print(family, type(finetune).__name__, before, after, before / after)
    assert after < before / 2
