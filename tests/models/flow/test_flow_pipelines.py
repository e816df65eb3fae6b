"""Pipelines of every layout as policies: packed latents, dynamic shifts, solvers, masks of each kind, inverted times."""

import pytest
import torch

from tests.models.pipelines.pipeline_cases import CLOSE, FLOAT32, SEEDS, SIDE, TEXTS, load, ragged
from uae.models.conditioners.states import TextCondition
from uae.models.finetune import LoRA
from uae.models.flow.policy import Exploration, FlowPolicy
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering
from uae.weights.placement import Placement

PIPELINES = ["sd3", "flux", "sana", "qwen_image"]


def create(name, guidance=1.0, placement=FLOAT32, pipe=None, negative=True, **settings):
    rendering = Rendering(SIDE, SIDE, steps=4, guidance=guidance, placement=placement)
    given = ragged(name, [3], 7) if guidance > 1 and negative else None
    return FlowPolicy(DiffusersRenderer(pipe or load(name, placement), rendering, given), Exploration(**settings))


@pytest.mark.parametrize("variant", [("flow", 0.7), ("dance", 0.3), ("cps", 0.7)])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_the_ratio_is_one(name, guidance, variant):
    policy, condition = create(name, guidance, noise=variant[0], noise_level=variant[1]), ragged(name)
    trajectory = policy.sample(condition, SEEDS)
    assert trajectory.logp_RS.shape == (4, 3)
    torch.testing.assert_close(policy.logprobs(trajectory), trajectory.logp_RS, **CLOSE)
    later = create(name, guidance, noise=variant[0], noise_level=variant[1], window=1, start=2)
    drawn = later.sample(condition, SEEDS)
    torch.testing.assert_close(later.logprobs(drawn), drawn.logp_RS, **CLOSE)
    one = later.sample(condition.index([2]), SEEDS[2:3])
    torch.testing.assert_close(one.actions_RS, drawn.actions_RS[2:3], **CLOSE)
    LoRA(2).attach(policy.learner, keep_reference=False)
    logp_NS = policy.logprobs(trajectory)
    torch.testing.assert_close(logp_NS.detach(), trajectory.logp_RS, **CLOSE)
    logp_NS.sum().backward()
    grads = [p.grad for n, p in policy.learner.network.named_parameters() if "lora_B" in n and p.grad is not None]
    assert sum(bool(grad.abs().max() > 0) for grad in grads) >= 4


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", PIPELINES)
def test_without_noise_it_is_the_renderer(name, guidance):
    """With the pipeline's own times and guidance. Of Sana's solver only the first order is Euler's method."""
    pipe, condition = load(name), ragged(name)
    if name == "sana":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, solver_order=1)
    policy = create(name, guidance, pipe=pipe, noise_level=1e-7)
    trajectory = policy.sample(condition, SEEDS)
    expected = policy.render(condition, SEEDS)
    torch.testing.assert_close(policy.pixels(trajectory), expected, atol=2e-5, rtol=0)
    noisy = create(name, guidance)
    moved = noisy.pixels(noisy.sample(condition, SEEDS))
    assert (moved - expected).abs().mean() > 1e-3


@pytest.mark.parametrize(("name", "guidance"), [("sd3", 4.0), ("sana", 1.0), ("omnigen", 1.0), ("omnigen", 2.0)])
def test_captions_as_text(name, guidance):
    """Read by the pipeline's own encoders, with its own negative; OmniGen's time runs the other way."""
    policy, condition = create(name, guidance, negative=False), TextCondition(TEXTS)
    trajectory = policy.sample(condition, SEEDS)
    torch.testing.assert_close(policy.logprobs(trajectory), trajectory.logp_RS, **CLOSE)
    images = policy.pixels(trajectory)
    assert images.shape == (4, 3, SIDE, SIDE)
    still = create(name, guidance, negative=False, noise_level=1e-7)
    if name != "sana":
        found = still.pixels(still.sample(condition, SEEDS))
        torch.testing.assert_close(found, policy.render(condition, SEEDS), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", PIPELINES)
def test_half_precision_latents_are_scored_as_the_pipeline_rounds_them(name):
    policy, condition = create(name, placement=Placement("bfloat16")), ragged(name)
    trajectory = policy.sample(condition, SEEDS)
    assert trajectory.actions_RS.dtype == (torch.float32 if name == "sana" else torch.bfloat16)
    assert trajectory.logp_RS.dtype == torch.float32
    torch.testing.assert_close(policy.logprobs(trajectory), trajectory.logp_RS, **CLOSE)
    assert policy.pixels(trajectory).dtype == torch.float32
