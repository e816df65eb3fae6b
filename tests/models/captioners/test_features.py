"""A frozen image tower runs once per rollout; one that learns runs at every pass. Neither changes a number."""

from dataclasses import replace

import pytest
import torch

from tests.models import families
from uae.models.finetune import Full, LoRA
from uae.types import Sampling

IMAGES, GROUP = (24, 40, 24), 2


@pytest.fixture
def captioner():
    """A captioner by family and finetuning, and its images."""

    def create(family, finetune):
        captioner = families.create(family)
        finetune.attach(captioner.learner, keep_reference=True)
        for name, parameter in captioner.learner.network.named_parameters():
            if "lora_B" in name:  # 0 at the start, so that the adapter would be without effect
                torch.nn.init.normal_(parameter, 0, 0.1)
        generator = torch.Generator().manual_seed(0)
        return captioner, [torch.rand(3, 24, width, generator=generator) for width in IMAGES]

    return create


def looks(captioner):
    """A list that grows by one whenever the image tower runs."""
    model, seen = captioner.learner.network.base.model, []
    tower = getattr(model, "visual", None) or model.vision_tower
    tower.register_forward_pre_hook(lambda *_: seen.append(1))
    return seen


def update(captioner, rollout, images):
    """Log-probs of some images' captions, and all gradients."""
    captioner.learner.network.zero_grad()
    logp_NT = captioner.logprobs(rollout.of(images, GROUP))
    logp_NT.sum().backward()
    return logp_NT.detach(), {n: p.grad for n, p in captioner.learner.network.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=0)
    assert found[1].keys() == expected[1].keys() != set()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


TEXT = Full(r".*\b(language_model|lm_head)\b.*")
CASES = [(family, LoRA(rank=2), False) for family in families.FAMILIES]
CASES += [("qwen2_5_vl", TEXT, False), ("llava", TEXT, True), ("qwen3_vl", LoRA(rank=2), True), ("internvl", TEXT, True)]


@pytest.mark.parametrize(("family", "finetune", "checkpointing"), CASES)
def test_a_frozen_tower_looks_once(captioner, family, finetune, checkpointing):
    captioner, images = captioner(family, finetune)
    captioner.learner.network.gradient_checkpointing = checkpointing
    seen = looks(captioner)
    rollout = captioner.sample(captioner.prepare(images), GROUP, Sampling(0.7, 8), range(6))
    assert len(seen) == 1
    plain = replace(rollout, context=replace(rollout.context, features=None))
    for part in ([0, 1, 2], [2], [2, 0]):
        seen.clear()
        found = update(captioner, rollout, part)
        assert not seen
        assert_same(found, update(captioner, plain, part))
        assert seen
    with captioner.learner.reference(), torch.no_grad():
        seen.clear()
        reference_NT = captioner.logprobs(rollout)
        assert not seen
        torch.testing.assert_close(reference_NT, captioner.logprobs(plain), atol=1e-5, rtol=0)


@pytest.mark.parametrize("finetune", [LoRA(rank=2, target_modules="all-linear"), Full(".*")], ids=["lora", "full"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava"])
def test_a_tower_that_learns_looks_every_time(captioner, family, finetune):
    captioner, images = captioner(family, finetune)
    context = captioner.prepare(images)
    with captioner.learner.reference():  # where no parameter of an adapter requires a gradient
        captioner.learner.network.prefill(context)
        assert captioner.sample(context, GROUP, Sampling(0.7, 4), range(6)).context.features is None or isinstance(finetune, Full)
    rollout = captioner.sample(context, GROUP, Sampling(0.7, 8), range(6))
    assert rollout.context.features is None
    gradients = update(captioner, rollout, [0, 1])[1]
    assert any("visual" in name or "vision_tower" in name for name in gradients)


def test_each_caption_is_scored_with_the_features_of_its_own_image(captioner):
    captioner, images = captioner("qwen2_5_vl", LoRA(rank=2))
    rollout = captioner.sample(captioner.prepare(images), GROUP, Sampling(0.7, 8), range(6))
    twin = replace(rollout, context=replace(rollout.context, features=rollout.context.features.index([2, 1, 0])))
    with torch.no_grad():
        right, wrong = captioner.logprobs(rollout), captioner.logprobs(twin)
    assert torch.equal(right[2:4], wrong[2:4])
    assert (right - wrong)[[0, 1, 4, 5]].abs().max() > 1e-3
