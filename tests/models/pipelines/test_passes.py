"""Rows of the negative pass that are left out: the images are those of the whole loop, and the rows are counted."""

from dataclasses import replace

import pytest
import torch

from tests.models.pipelines.pipeline_cases import (
    CLOSE,
    FLOAT32,
    LENGTHS,
    SEEDS,
    SIDE,
    TEXTS,
    computed_rows,
    load,
    masks_of_ones,
    mixing,
    one_row,
    plainly,
    ragged,
)
from uae.models.conditioners.states import EmbeddingCondition, TextCondition
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering

STEPS = 5
MIDDLE = (0.2, 0.6)  # its steps are 1 and 2
TOGETHER = ["sd3", "sana", "sdxl", "pixart"]
each = pytest.mark.parametrize("name", TOGETHER)


def pixart():
    """PixArt Sigma, whose transformer also predicts a variance. Its layout is no part of the rehearsal."""
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16,
            sample_size=SIDE // 2, caption_channels=32, patch_size=2,
        )  # fmt: skip
        for weight in transformer.parameters():
            torch.nn.init.normal_(weight, 0, 0.2)
    parts = {"tokenizer": None, "text_encoder": None, "vae": load("sdxl").vae}
    return PixArtSigmaPipeline(transformer=transformer, scheduler=DPMSolverMultistepScheduler(), **parts)


def loaded(name):
    return pixart() if name == "pixart" else load(name)


def conditions(name):
    """Of four captions, and a negative that is neither the longest nor the shortest."""
    layout = "sana" if name == "pixart" else name
    return ragged(layout), ragged(layout, [7], seed=1)


def create(name, negative, **settings):
    settings = {"guidance": 3.0, "steps": STEPS, "placement": FLOAT32, **settings}
    return DiffusersRenderer(loaded(name), Rendering(SIDE, SIDE, **settings), negative)


@each
@pytest.mark.parametrize(("interval", "guided"), [(None, [0, 1, 2, 3, 4]), (MIDDLE, [1, 2]), ((0.0, 0.2), [0]), ((0.6, 1.0), [3, 4])])
def test_a_step_is_guided_inside_the_interval_only(name, interval, guided):
    """Against the pipeline's own loop without guidance, around a denoiser that mixes both velocities in these steps."""
    condition, negative = conditions(name)
    images = create(name, negative, guidance_interval=interval).render(condition, SEEDS)
    plain = loaded(name)
    mixing(name, plain, negative, [3.0 if step in guided else 1.0 for step in range(STEPS)])
    for row, seed in enumerate(SEEDS):
        arguments = masks_of_ones(name, one_row(condition, row))
        expected = plainly(name, plain, seed, steps=STEPS, guidance=1.0, **arguments)
        torch.testing.assert_close(images[row], expected, **CLOSE)


@each
def test_the_whole_interval_is_plain_guidance(name):
    condition, negative = conditions(name)
    plain = create(name, negative).render(condition, SEEDS)
    assert torch.equal(create(name, negative, guidance_interval=(0.0, 1.0)).render(condition, SEEDS), plain)
    part = create(name, negative, guidance_interval=MIDDLE).render(condition, SEEDS)
    assert (part - plain).abs().max() > 1e-3


@each
@pytest.mark.parametrize("seeds", [[3, 3, 3, 3], [3, 5, 3, 5], [1, 2, 3, 4]])
def test_rows_of_equal_noise_share_their_first_negative_velocity(name, seeds):
    """Rows saved: rows minus distinct seeds. The images are those of the pipeline's own batches."""
    condition, negative = conditions(name)
    sharing, whole = create(name, negative, steps=2), create(name, negative, steps=2)
    whole.contract = replace(whole.contract, quirks=replace(whole.contract.quirks, negative_first=False))
    fewer, all_rows = computed_rows(sharing.pipe), computed_rows(whole.pipe)
    images, expected = sharing.render(condition, seeds), whole.render(condition, seeds)
    torch.testing.assert_close(images, expected, atol=1e-6, rtol=0)
    assert all_rows == [8, 8]
    assert fewer == [4 + len(set(seeds)), 8]


@each
def test_outside_the_interval_only_positive_rows_are_computed(name):
    condition, negative = conditions(name)
    one = create(name, negative, guidance_interval=MIDDLE, rows=3)
    rows = computed_rows(one.pipe)
    one.render(condition, SEEDS)
    assert rows == [3, 6, 6, 3, 3, 1, 2, 2, 1, 1]


@pytest.mark.parametrize("name", ["sd3", "sana"])
def test_captions_as_text_have_the_pipelines_own_negative(name):
    one, plain = create(name, None, guidance_interval=(0.0, 0.2)), create(name, None)
    plain.contract = replace(plain.contract, quirks=replace(plain.contract.quirks, negative_first=False))
    condition = TextCondition(TEXTS)
    rows = computed_rows(one.pipe)
    images = one.render(condition, [3] * 4)
    assert rows == [5, 4, 4, 4, 4]
    one.rendering = replace(one.rendering, guidance_interval=None)
    torch.testing.assert_close(one.render(condition, [3] * 4), plain.render(condition, [3] * 4), atol=2e-6, rtol=0)
    assert (images - plain.render(condition, [3] * 4)).abs().max() > 1e-3


@pytest.mark.parametrize("last", [None, 3])
@each
def test_gradients_are_those_of_the_loop(name, last):
    """With the steps before the last ones held constant, and with rows of equal noise."""
    condition, negative = conditions(name)

    def gradient(one, rows, length):
        embeds = condition.embeds_NLD[rows, :length].clone().requires_grad_()
        pooled = None if condition.pooled_NP is None else condition.pooled_NP[rows]
        own = EmbeddingCondition(embeds, condition.mask_NL[rows, :length], pooled)
        one.render(own, [SEEDS[row] for row in rows], grad=True, last=last).square().sum().backward()
        return embeds.grad

    found = gradient(create(name, negative, guidance_interval=MIDDLE), range(4), 9)
    by_hand = create(name, negative, guidance=1.0)
    mixing(name, by_hand.pipe, negative, [3.0 if step in (1, 2) else 1.0 for step in range(STEPS)])
    for row, length in enumerate(LENGTHS):
        expected = gradient(by_hand, [row], length)[0]
        scale = float(expected.abs().max())
        torch.testing.assert_close(found[row, :length], expected, atol=1e-3 * scale, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "changes", "fault"),
    [
        ("sd3", {"guidance_interval": (0.5, 0.5)}, r"\[0.5, 0.5\], allowed: two numbers from 0 \(noise\) to 1 \(image\)"),
        ("sd3", {"guidance_interval": (-0.1, 0.5)}, "allowed: two numbers from 0"),
        ("sd3", {"guidance_interval": (0.5, 1.5)}, "allowed: two numbers from 0"),
        ("sd3", {"guidance_interval": (float("nan"), 1.0)}, "allowed: two numbers from 0"),
        ("sd3", {"guidance": 1.0}, r"but rendering.guidance=1.0 applies none; allowed: null, or .*rendering.guidance above 1"),
        ("sd3", {"guidance_interval": (0.21, 0.39)}, r"which none of 5 steps is in; allowed: .* one i / 5"),
        ("qwen_image", {}, "but where QwenImagePipeline computes its negative pass is not known; allowed: null"),
    ],
)
def test_intervals_that_cannot_hold(name, changes, fault):
    key = "change model.init_args.system.init_args.rendering.guidance_interval"
    with pytest.raises(ValueError, match=rf"^rendering.guidance_interval=.*{fault}.*; {key}$"):
        create(name, ragged(name, [7], seed=1), **{"guidance_interval": MIDDLE, **changes})


def test_a_scheduler_of_second_order_is_refused():
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = load("sd3")
    pipe.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(ValueError, match="but FlowMatchHeunDiscreteScheduler predicts more than once per step"):
        DiffusersRenderer(pipe, Rendering(SIDE, SIDE, guidance=2.0, guidance_interval=MIDDLE), ragged("sd3", [7]))
