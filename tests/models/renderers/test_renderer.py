import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0
from torch.distributed.fsdp import FSDPModule

from uae.models.conditioners.states import EmbeddingCondition, TextCondition, pad_to_length
from uae.models.lengths import alike
from uae.models.pipelines.masks import MaskedJointAttention
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering

TEXTS = ["a red square", "a tiny blue ring at top left and a white cross on a navy background", "a pink cross", ""]
SEEDS = [3, 3, 5, 2**62 + 1]
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def condition(decoder):
    return decoder[0].encode(TEXTS)


@pytest.fixture
def renderer(decoder):
    return copy.deepcopy(decoder[1])


@pytest.fixture
def guided(decoder):
    """The same networks with guidance."""
    conditioner, renderer = decoder
    pipe = copy.deepcopy(renderer.pipe)
    return DiffusersRenderer(pipe, Rendering(24, 24, steps=3, guidance=2.0), conditioner.encode([""]))


@pytest.fixture
def calls(renderer, guided):
    """Rows of every call of a transformer."""
    rows = []
    for one in (renderer, guided):
        one.pipe.transformer.register_forward_pre_hook(
            lambda _, arguments, named: rows.append(len(named["hidden_states"])), with_kwargs=True
        )
    return rows


def unpadded(condition, row):
    """One row without its padding, and without anything that says so."""
    length = int(condition.mask_NL[row].sum())
    return condition.embeds_NLD[row : row + 1, :length], condition.pooled_NP[row : row + 1]


@torch.no_grad()
def plain_render(pipe, positive, negative, guidance, seed, steps):
    """Euler's method on the flow, one image at a time, with diffusers' own attention and no padding anywhere."""
    transformer = copy.deepcopy(pipe.transformer)
    transformer.set_attn_processor(JointAttnProcessor2_0())
    noise = torch.randn(1, transformer.config.in_channels, 3, 3, generator=torch.Generator().manual_seed(seed))
    sigmas = [*torch.linspace(1, 1 / 1000, steps).tolist(), 0.0]
    x = noise
    for now, then in zip(sigmas, sigmas[1:], strict=False):
        velocities = [
            transformer(x, encoder_hidden_states=e, pooled_projections=p, timestep=torch.tensor([1000 * now]))[0]
            for e, p in (positive, negative)
        ]
        x = x + (then - now) * (velocities[1] + guidance * (velocities[0] - velocities[1]))
    image = pipe.vae.decode(x / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor).sample
    return (image[0] / 2 + 0.5).clamp(0, 1)


# ------------------------------------------------------------------------------------------------------- one image


def test_an_image_is_the_flow_of_its_own_condition_and_noise(renderer, condition):
    images = renderer.render(condition, SEEDS)
    assert images.shape == (4, 3, 24, 24)
    assert images.dtype == torch.float32
    for row, seed in enumerate(SEEDS):
        once = unpadded(condition, row)
        torch.testing.assert_close(images[row], plain_render(renderer.pipe, once, once, 1.0, seed, 3), **CLOSE)


def test_guidance_mixes_two_velocities(guided, condition, decoder):
    images = guided.render(condition, SEEDS)
    negative = unpadded(decoder[0].encode([""]), 0)
    for row, seed in enumerate(SEEDS):
        expected = plain_render(guided.pipe, unpadded(condition, row), negative, 2.0, seed, 3)
        torch.testing.assert_close(images[row], expected, **CLOSE)


def test_a_negative_longer_than_the_captions(renderer, decoder):
    longer = decoder[0].encode([TEXTS[1]])
    guided = DiffusersRenderer(renderer.pipe, Rendering(24, 24, steps=2, guidance=1.5), longer)
    condition = decoder[0].encode(TEXTS[:1])
    expected = plain_render(renderer.pipe, unpadded(condition, 0), unpadded(longer, 0), 1.5, 4, 2)
    torch.testing.assert_close(guided.render(condition, [4])[0], expected, **CLOSE)


def test_captions_and_noise_matter(renderer, condition):
    a, b, c, _ = renderer.render(condition, SEEDS)
    assert (a - b).abs().mean() > 1e-3  # same noise, another caption
    again = renderer.render(condition, [4, 3, 5, 6])
    assert (again[0] - a).abs().mean() > 1e-3
    assert torch.equal(again[1], b)
    assert torch.equal(again[2], c)


def test_rows_do_not_depend_on_their_batch(renderer, condition):
    together = renderer.render(condition, SEEDS)
    for row in range(4):
        torch.testing.assert_close(renderer.render(condition.index([row]), SEEDS[row : row + 1])[0], together[row], **CLOSE)
    turned = renderer.render(condition.index([3, 1, 0, 2]), [SEEDS[row] for row in (3, 1, 0, 2)])
    torch.testing.assert_close(turned, together[[3, 1, 0, 2]], **CLOSE)


@pytest.mark.parametrize("which", ["renderer", "guided"])
def test_padding_changes_nothing(request, which, condition):
    one = request.getfixturevalue(which)
    padded = pad_to_length(condition, condition.mask_NL.shape[1] + 7)
    padded.embeds_NLD[padded.mask_NL == 0] = 50.0  # whatever is there
    torch.testing.assert_close(one.render(padded, SEEDS), one.render(condition, SEEDS), **CLOSE)


def test_micro_batches_change_nothing(renderer, condition, calls):
    whole = renderer.render(condition, SEEDS)
    assert calls == [4] * 3
    calls.clear()
    renderer.rendering = replace(renderer.rendering, rows=3)
    torch.testing.assert_close(renderer.render(condition, SEEDS), whole, **CLOSE)
    assert calls == [3] * 3 + [1] * 3


def test_captions_of_similar_length_are_drawn_together(renderer, decoder):
    """Each with the pixels it has alone, and with fewer tokens of text than if all had the length of the longest."""
    texts = [TEXTS[1] if row % 3 == 0 else TEXTS[2] for row in range(27)]
    condition, sizes = decoder[0].encode(texts), []
    renderer.pipe.transformer.register_forward_pre_hook(
        lambda _, __, named: sizes.append(tuple(named["encoder_hidden_states"].shape[:2])), with_kwargs=True
    )
    images = renderer.render(condition, range(27))
    long, short = (int(condition.mask_NL[row].sum()) for row in (0, 1))
    assert set(sizes) == {(9, long), (18, short)}
    for row in (0, 1, 26):
        own = unpadded(condition, row)
        expected = plain_render(renderer.pipe, own, own, 1.0, row, renderer.rendering.steps)
        torch.testing.assert_close(images[row], expected, **CLOSE)


def test_rows_alike():
    """Known answers: at least two rows together, and beyond them only rows of three quarters of the longest."""
    assert alike([10, 40, 31, 29, 9, 40, 7], 2, 0.75) == [[1, 5, 2], [3, 0], [4, 6]]
    assert alike([4, 4, 4], 8, 0.75) == [[0, 1, 2]]
    assert alike([3, 5, 3], 1, 1.0) == [[1], [0, 2]]
    assert alike([], 8, 0.75) == []


@pytest.mark.parametrize("masking", ["joint", "none"])
def test_a_sharded_denoiser_is_called_as_often_in_every_process(renderer, condition, masking):
    """However long a process's captions are: a process that calls less would leave the others waiting."""
    kind = type(renderer.pipe.transformer)
    renderer.pipe.transformer.__class__ = type("Sharded", (FSDPModule, kind), {})
    renderer.contract = replace(renderer.contract, masking=masking)
    counts = {len(list(renderer._batches(condition.index(rows)))) for rows in ([0, 0, 0, 0], [0, 1, 2, 3])}
    assert counts == {1 if masking == "joint" else 4}


def test_guidance_of_one_skips_the_second_pass(renderer, guided, condition, calls):
    renderer.render(condition, SEEDS)
    assert sum(calls) == 3 * 4
    calls.clear()
    guided.render(condition, SEEDS)
    assert sum(calls) == 3 * 4 * 2


def test_images_stay_in_range(renderer, condition):
    renderer.pipe.vae.decoder.layers[-1].weight.data.mul_(100)
    images = renderer.render(condition, SEEDS)
    assert images.min() == 0
    assert images.max() == 1


# --------------------------------------------------------------------------------------------------------- gradient


@pytest.mark.parametrize("which", ["renderer", "guided"])
def test_the_gradient_reaches_the_condition_and_nothing_frozen(request, which, condition):
    one = request.getfixturevalue(which)
    embeds = condition.embeds_NLD.clone().requires_grad_()
    pooled = condition.pooled_NP.clone().requires_grad_()
    images = one.render(EmbeddingCondition(embeds, condition.mask_NL, pooled), SEEDS, grad=True)
    torch.testing.assert_close(images.detach(), one.render(condition, SEEDS), **CLOSE)
    images.square().sum().backward()
    real = condition.mask_NL.bool()
    assert (embeds.grad[real].abs().sum(-1) > 0).all()  # every word of every caption
    assert embeds.grad[~real].abs().max() == 0
    assert (pooled.grad.abs().sum(-1) > 0).all()
    assert all(p.grad is None and not p.requires_grad for module in one.modules() for p in module.parameters())


def test_the_gradient_is_the_slope(renderer, condition):
    once = condition.index([0])
    direction = torch.randn(once.embeds_NLD.shape, generator=torch.Generator().manual_seed(1))
    step = torch.tensor(0.0, requires_grad=True)

    def total(step, grad):
        moved = EmbeddingCondition(once.embeds_NLD + step * direction, once.mask_NL, once.pooled_NP)
        return renderer.render(moved, [1], grad=grad).double().square().sum()

    (slope,) = torch.autograd.grad(total(step, True), step)
    difference = (total(torch.tensor(1e-2), False) - total(torch.tensor(-1e-2), False)) / 2e-2
    torch.testing.assert_close(slope.double(), difference, atol=0.02 * float(difference.abs()) + 1e-3, rtol=0)
    assert difference.abs() > 0.01


def test_no_gradient_unless_asked(renderer, condition):
    embeds = condition.embeds_NLD.clone().requires_grad_()
    assert not renderer.render(EmbeddingCondition(embeds, condition.mask_NL, condition.pooled_NP), SEEDS).requires_grad


def test_networks_are_frozen_and_in_eval_mode(decoder):
    pipe = copy.deepcopy(decoder[1].pipe)
    pipe.transformer.requires_grad_(True).train()
    renderer = DiffusersRenderer(pipe, Rendering(24, 24))
    assert len(renderer.modules()) == 2
    assert not any(module.training for part in renderer.modules() for module in part.modules())
    assert not any(p.requires_grad for part in renderer.modules() for p in part.parameters())


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("seeds", [[], [1, 2, 3], [1, 2, 3, 4, 5]])
def test_one_seed_per_condition(renderer, condition, seeds):
    with pytest.raises(ValueError, match=f"4 conditions but {len(seeds)} seeds"):
        renderer.render(condition, seeds)


def test_guidance_needs_a_negative(renderer):
    with pytest.raises(ValueError, match="guidance=3.0 needs a negative condition"):
        DiffusersRenderer(renderer.pipe, Rendering(24, 24, guidance=3.0))


class Words:
    """A pipeline that takes prompts: its image is the number of words, and some noise."""

    def __init__(self):
        self.transformer, self.tokenizer, self.components = torch.nn.Linear(1, 1), object(), {}
        self.transformer.config = SimpleNamespace()

    def set_progress_bar_config(self, disable):
        pass

    def __call__(self, prompt, height, width, num_inference_steps, guidance_scale, generator, output_type, return_dict):
        assert (num_inference_steps, guidance_scale, output_type, return_dict) == (7, 4.0, "pt", False)
        noise = [torch.rand(3, height, width, generator=one) for one in generator]
        return (torch.stack([x / 100 + len(text.split()) / 10 for x, text in zip(noise, prompt, strict=True)]),)


def test_captions_go_as_text_to_a_pipeline_with_its_own_encoders():
    renderer = DiffusersRenderer(Words(), Rendering(4, 6, steps=7, guidance=4.0, rows=2))
    images = renderer.render(TextCondition(["a b", "a", "a b c"]), [5, 5, 6])
    assert images.shape == (3, 3, 4, 6)
    torch.testing.assert_close(images[0] - images[1], torch.full((3, 4, 6), 0.1))
    torch.testing.assert_close(images[2], torch.rand(3, 4, 6, generator=torch.Generator().manual_seed(6)) / 100 + 0.3)


# -------------------------------------------------------------------------------------------------- joint attention


@pytest.fixture(params=["rms_norm", None])
def transformer(request):
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=3, patch_size=1, in_channels=4, num_layers=3, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, caption_projection_dim=16, pooled_projection_dim=10, out_channels=4, pos_embed_max_size=3,
        qk_norm=request.param, dual_attention_layers=(0,),
    ).eval()  # fmt: skip


@torch.no_grad()
def test_without_a_mask_attention_is_diffusers_own(transformer):
    g = torch.Generator().manual_seed(0)
    x, text, pooled = (torch.randn(size, generator=g) for size in ((2, 4, 3, 3), (2, 5, 12), (2, 10)))
    named = {"encoder_hidden_states": text, "pooled_projections": pooled, "timestep": torch.tensor([10.0, 700.0])}
    transformer.set_attn_processor(JointAttnProcessor2_0())
    stock = transformer(x, **named).sample
    shorter = transformer(x, **{**named, "encoder_hidden_states": text[:, :3]}).sample
    transformer.set_attn_processor(MaskedJointAttention())
    assert torch.equal(transformer(x, **named).sample, stock)
    for mask, expected in ((torch.ones(2, 5), stock), (torch.tensor([[1, 1, 1, 0, 0]] * 2), shorter)):
        masked = transformer(x, **named, joint_attention_kwargs={"text_mask": mask}).sample
        torch.testing.assert_close(masked, expected, **CLOSE)
    assert (stock - shorter).abs().max() > 1e-4  # padding does move the stock processor's pixels
