import pytest
import torch

from tests.models.flow.flow_cases import (
    SEEDS,
    SIGMAS,
    STEPS,
    TEXTS,
    plain_transformer,
    plain_velocity,
    tiny_renderer,
    unpadded,
)
from tests.models.pipelines.pipeline_cases import FLOAT32, SIDE, load, ragged
from uae.models.conditioners.states import EmbeddingCondition
from uae.models.pipelines.steps import check_flow
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering


@pytest.fixture
def condition(decoder):
    return decoder[0].encode(TEXTS)


def gradient(renderer, condition, last, weight):
    """Of a projection of the images, to embeddings and pooled vectors."""
    embeds, pooled = condition.embeds_NLD.clone().requires_grad_(), condition.pooled_NP.clone().requires_grad_()
    images = renderer.render(EmbeddingCondition(embeds, condition.mask_NL, pooled), SEEDS, grad=True, last=last)
    (images * weight).sum().backward()
    return images.detach(), embeds.grad, pooled.grad


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_truncated_gradient_changes_no_pixel(decoder, condition, guidance):
    renderer = tiny_renderer(decoder, guidance)
    plain = renderer.render(condition, SEEDS)
    for last in (1, 2, STEPS, 99, None):
        assert torch.equal(renderer.render(condition, SEEDS, grad=True, last=last).detach(), plain)
    assert torch.equal(renderer.render(condition, SEEDS, last=2), plain)


def test_a_solver_with_memory_draws_the_same_image():
    pipe = load("sana")
    renderer = DiffusersRenderer(pipe, Rendering(SIDE, SIDE, steps=4, placement=FLOAT32))
    condition = ragged("sana")
    plain = renderer.render(condition, SEEDS)
    assert torch.equal(renderer.render(condition, SEEDS, grad=True, last=2).detach(), plain)


def test_all_steps_are_the_full_gradient(decoder, condition):
    renderer = tiny_renderer(decoder, 3.0)
    weight = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    full = gradient(renderer, condition, None, weight)
    for last in (STEPS, STEPS + 3):
        for found, expected in zip(gradient(renderer, condition, last, weight), full, strict=True):
            assert torch.equal(found, expected)
    fewer = gradient(renderer, condition, STEPS - 1, weight)
    assert (fewer[1] - full[1]).abs().max() > 1e-3 * full[1].abs().max()


@pytest.mark.parametrize("last", [1, 3])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_steps_are_constant(decoder, condition, last, guidance):
    """Against the loop, cut by hand."""
    renderer = tiny_renderer(decoder, guidance)
    weight = torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    _, embeds_grad, pooled_grad = gradient(renderer, condition, last, weight)
    transformer, vae = plain_transformer(renderer.pipe.transformer), renderer.pipe.vae
    negative = unpadded(renderer.negative, 0) if guidance > 1 else None
    for row, seed in enumerate(SEEDS):
        own = [one.clone().requires_grad_() for one in unpadded(condition, row)]
        x = torch.randn(1, 16, 3, 3, generator=torch.Generator().manual_seed(seed))
        for i, (sigma, then) in enumerate(zip(SIGMAS, SIGMAS[1:], strict=False)):
            if i <= STEPS - last:
                x = x.detach()
            x = x + (then - sigma) * plain_velocity(transformer, x, sigma, own, negative, guidance)
        x = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        ((x[0] / 2 + 0.5).clamp(0, 1) * weight[row]).sum().backward()
        scale = own[0].grad.abs().max()
        torch.testing.assert_close(embeds_grad[row, : own[0].shape[1]], own[0].grad[0], atol=1e-3 * scale, rtol=1e-3)
        torch.testing.assert_close(pooled_grad[row], own[1].grad[0], atol=1e-3 * scale, rtol=1e-3)


def test_the_mode_is_left_as_it_was(decoder, condition):
    renderer = tiny_renderer(decoder)
    with torch.no_grad():
        renderer.render(condition, SEEDS, grad=True, last=1)
        assert not torch.is_grad_enabled()
    assert torch.is_grad_enabled()
    hooks = renderer.pipe.transformer._forward_pre_hooks, renderer.pipe.transformer._forward_hooks
    assert not any(hooks)
    assert "step" not in vars(renderer.pipe.scheduler)


def test_no_steps_is_a_mistake(decoder, condition):
    with pytest.raises(ValueError, match="last=0 denoising steps with a gradient; allowed: 1 or more"):
        tiny_renderer(decoder).render(condition, SEEDS, grad=True, last=0)


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "qwen_image", "omnigen"])
def test_flows_are_recognised(name):
    check_flow(load(name))


def test_other_diffusions_are_refused():
    from diffusers import DPMSolverMultistepScheduler, FlowMatchHeunDiscreteScheduler

    with pytest.raises(ValueError, match="StableDiffusionXLPipeline with EulerDiscreteScheduler does not draw by flow"):
        check_flow(load("sdxl"))
    pipe = load("sd3")
    for scheduler in (FlowMatchHeunDiscreteScheduler(), DPMSolverMultistepScheduler()):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match=f"{type(scheduler).__name__} does not draw by flow matching"):
            check_flow(pipe)
