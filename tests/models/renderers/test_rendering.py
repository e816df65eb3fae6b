from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.models.pipelines.pipeline_cases import (
    CLOSE,
    FLOAT32,
    SEEDS,
    SIDE,
    TEXTS,
    WITH_EMBEDDINGS,
    count_rows,
    load,
    one_row,
    plainly,
    ragged,
)
from uae.models.conditioners.states import EmbeddingCondition, TextCondition
from uae.models.pipelines.contracts import denoiser_of
from uae.models.pipelines.masks import masked_passes
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering
from uae.weights.placement import Placement


def settings(**changes):
    return Rendering(SIDE, SIDE, **{"steps": 2, "placement": FLOAT32, **changes})


# --------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("name", WITH_EMBEDDINGS)
def test_half_precision_is_the_pipelines_own(name):
    half = Placement("bfloat16")
    renderer = DiffusersRenderer(load(name, half), settings(placement=half))
    images = renderer.render(TextCondition(TEXTS[:1]), SEEDS[:1])
    assert images.dtype == torch.float32
    plain = plainly(name, load(name, half), SEEDS[0], guidance=1.0, prompt=TEXTS[0])
    assert plain.dtype == torch.bfloat16
    torch.testing.assert_close(images[0], plain.float(), atol=0.02, rtol=0)
    assert renderer.render(ragged(name), SEEDS).isfinite().all()  # float32 embeddings into half-precision networks


def test_weights_in_8_bits():
    small = Placement("float8")
    renderer = DiffusersRenderer(load("sd3", small), settings(placement=small))
    condition = ragged("sd3")
    embeds = condition.embeds_NLD.clone().requires_grad_()
    images = renderer.render(EmbeddingCondition(embeds, condition.mask_NL, condition.pooled_NP), SEEDS, grad=True)
    images.sum().backward()
    transformer = renderer.pipe.transformer
    assert transformer.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    assert (embeds.grad[condition.mask_NL.bool()].abs().sum(-1) > 0).all()
    half = Placement("bfloat16")  # of the same dtype, because torch 2.11 draws other noise in float32
    full = DiffusersRenderer(load("sd3", half), settings(placement=half)).render(condition, SEEDS)
    assert (images - full).abs().mean() < 0.05 < full.std()


def test_slices_and_tiles():
    renderer = DiffusersRenderer(load("sd3"), settings(slice_vae=True, tile_vae=True))
    assert renderer.pipe.vae.use_slicing
    assert renderer.pipe.vae.use_tiling
    plain = DiffusersRenderer(load("sd3"), settings())
    assert not plain.pipe.vae.use_slicing
    condition = ragged("sd3")
    torch.testing.assert_close(renderer.render(condition, SEEDS), plain.render(condition, SEEDS), **CLOSE)


def test_networks_wait_and_work_where_they_are_placed():
    renderer = DiffusersRenderer(load("sd3"), settings(placement=Placement("float32", device="cpu", offload=True)))
    assert renderer.to("meta") is renderer
    assert renderer.pipe.transformer.device.type == "cpu"
    assert renderer.render(ragged("sd3"), SEEDS).device.type == "meta"  # drawn on the CPU, handed to the policy's device


def test_gradients_and_offloading_exclude_each_other():
    renderer = DiffusersRenderer(load("sd3"), settings(placement=Placement("float32", "meta", offload=True)))
    with pytest.raises(ValueError, match="set model.init_args.system.init_args.rendering.placement.offload to false"):
        renderer.render(ragged("sd3"), SEEDS, grad=True)


# -------------------------------------------------------------------------------------------------- unmasked pipelines


def unmasked():
    """CogView 4: text and image attend to each other, and no argument of the call hides padding."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler

    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = CogView4Transformer2DModel(
            in_channels=4, out_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=2, text_embed_dim=32,
            time_embed_dim=8, condition_dim=4, pos_embed_max_size=16, sample_size=8, rope_axes_dim=(16, 16),
        )  # fmt: skip
        for weight in transformer.parameters():
            if weight.ndim > 1:
                nn.init.normal_(weight, 0, weight[0].numel() ** -0.5)
    parts = {"tokenizer": None, "text_encoder": None, "vae": load("sdxl").vae}
    return CogView4Pipeline(transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(), **parts)


def test_without_a_mask_rows_of_one_length_go_together_unpadded():
    condition = replace(ragged("sana"), pooled_NP=None)  # lengths 5, 2, 9, 5
    renderer = DiffusersRenderer(unmasked(), settings())
    rows = count_rows(renderer.pipe)
    images = renderer.render(condition, SEEDS)
    assert rows == [1, 1, 2, 2, 1, 1]
    for row, seed in enumerate(SEEDS):
        expected = plainly("cogview4", renderer.pipe, seed, guidance=1.0, **one_row(condition, row))
        torch.testing.assert_close(images[row], expected, **CLOSE)


def test_without_a_mask_guidance_takes_a_negative_of_the_same_length():
    condition, negative = ragged("sana", [5, 5]), ragged("sana", [5], seed=1)
    renderer = DiffusersRenderer(unmasked(), settings(guidance=2.0), negative)
    arguments = one_row(condition, 1) | one_row(negative, 0, "negative_")
    expected = plainly("cogview4", renderer.pipe, SEEDS[1], guidance=2.0, **arguments)
    torch.testing.assert_close(renderer.render(condition, SEEDS[:2])[1], expected, **CLOSE)


def test_a_mask_per_pass_needs_to_know_the_pass():
    transformer = load("flux").transformer
    with (
        masked_passes(transformer, [(torch.zeros(1, 2, 32), torch.ones(1, 2))]),
        pytest.raises(RuntimeError, match="embeddings that no mask belongs to"),
    ):
        transformer(hidden_states=torch.zeros(1, 4, 16), encoder_hidden_states=torch.zeros(1, 2, 32))
    assert not transformer._forward_pre_hooks


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            "sd3",
            {"height": 40},
            r"rendering.height=40 must be a multiple of 16 .*"
            r"change model.init_args.system.init_args.rendering.height",
        ),
        (
            "sana",
            {"width": 48},
            r"rendering.width=48 must be a multiple of 32 .*"
            r"change model.init_args.system.init_args.rendering.width",
        ),
        ("flux", {"width": 24}, r"rendering.width=24 must be a multiple of 16"),
        ("qwen_image", {"width": 24}, r"rendering.width=24 must be a multiple of 16"),
        ("sdxl", {"height": 0}, r"rendering.height=0 must be a multiple of 8"),
        ("omnigen", {"height": 24}, r"rendering.height=24 must be a multiple of 16"),
        ("sd3", {"steps": 0}, r"rendering.steps=0 must be at least 1"),
        ("sd3", {"rows": 0}, r"rendering.rows=0 must be at least 1"),
        (
            "sd3",
            {"distilled_guidance": 3.5},
            r"not distilled for guidance; "
            r"set model.init_args.system.init_args.rendering.distilled_guidance to null",
        ),
        (
            "qwen_image",
            {"distilled_guidance": 3.5},
            r"rendering.distilled_guidance=3.5, but this QwenImagePipeline is not",
        ),
        (
            "flux",
            {"guidance": 2.0},
            r"guidance=2.0 needs a negative condition; give one or set model.init_args.system.init_args.rendering.guidance to 1",
        ),
    ],
)
def test_settings_a_pipeline_cannot_follow(name, changes, message):
    with pytest.raises(ValueError, match=message):
        DiffusersRenderer(load(name), replace(settings(), **changes))


def test_distilled_guidance_is_another_input_than_guidance():
    condition = ragged("flux", [7, 7])
    images = DiffusersRenderer(load("flux"), settings(distilled_guidance=1.5)).render(condition, SEEDS[:2])
    arguments = one_row(condition, 1) | {"guidance_scale": 1.5}
    expected = plainly("flux", load("flux"), SEEDS[1], guidance=1.0, **arguments)
    torch.testing.assert_close(images[1], expected, **CLOSE)
    default = DiffusersRenderer(load("flux"), settings()).render(condition, SEEDS[:2])
    assert (default - images).abs().max() > 1e-3


def test_conditions_of_the_wrong_kind():
    embeddings, words = ragged("sana"), TextCondition(["ugly"])
    with pytest.raises(ValueError, match="OmniGenPipeline takes captions as text only"):
        DiffusersRenderer(load("omnigen"), settings()).render(embeddings, SEEDS)
    with pytest.raises(ValueError, match="OmniGenPipeline takes no negative condition"):
        DiffusersRenderer(load("omnigen"), settings(guidance=2.0), words)
    with pytest.raises(ValueError, match=r"of the kind of the captions' \(EmbeddingCondition\), TextCondition was given"):
        DiffusersRenderer(load("sana"), settings(guidance=2.0), words).render(embeddings, SEEDS)
    key = "model.init_args.system.init_args.rendering.guidance"
    with pytest.raises(ValueError, match=rf"\(EmbeddingCondition\), none was given; .*set {key} to 1"):
        DiffusersRenderer(load("sana"), settings(guidance=2.0)).render(embeddings, SEEDS)
    with pytest.raises(ValueError, match="takes a pooled vector per caption"):
        DiffusersRenderer(load("sd3"), settings()).render(replace(ragged("sd3"), pooled_NP=None), SEEDS)


def test_what_networks_cannot_do():
    pipe = load("sd3")
    pipe.register_modules(vae=nn.Identity())
    with pytest.raises(ValueError, match="set model.init_args.system.init_args.rendering.slice_vae to false"):
        DiffusersRenderer(pipe, settings(slice_vae=True))
    pipe = load("sd3")
    pipe.__dict__["transformer"] = Uncastable()
    key = "model.init_args.system.init_args.rendering.placement.dtype"
    with pytest.raises(ValueError, match=rf"Uncastable cannot store 8-bit weights; set {key}"):
        DiffusersRenderer(pipe, settings(placement=Placement("float8")))
    assert denoiser_of(pipe) is pipe.transformer


class Uncastable(nn.Module):
    config = type("Config", (), {"patch_size": 2})


def test_images_carry_no_watermark():
    pipe = load("sdxl")
    pipe.watermark = object()  # diffusers adds one where a package for it is installed
    assert DiffusersRenderer(pipe, settings()).render(ragged("sdxl"), SEEDS).isfinite().all()
