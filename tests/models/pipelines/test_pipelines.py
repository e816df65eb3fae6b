import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch

from tests.models.pipelines.pipeline_cases import (
    CLOSE,
    FLOAT32,
    LENGTHS,
    REAL_GUIDANCE,
    SEEDS,
    SIDE,
    TEXTS,
    WITH_EMBEDDINGS,
    count_rows,
    folder,
    load,
    masks_of_ones,
    mixing,
    one_row,
    plainly,
    ragged,
)
from uae.models.conditioners.states import EmbeddingCondition, TextCondition, pad_to_length
from uae.models.pipelines.contracts import denoiser_of, text_encoders_of
from uae.models.pipelines.loading import load_pipeline
from uae.models.renderers.diffusers import DiffusersRenderer
from uae.models.renderers.rendering import Rendering
from uae.rehearsal.pipelines import PIPELINES
from uae.weights.placement import Placement

each = pytest.mark.parametrize("name", WITH_EMBEDDINGS)
guided_or_not = pytest.mark.parametrize("guidance", [1.0, 3.0])


def renderer_of(name, guidance=1.0, negative=None, **settings):
    settings = {"height": SIDE, "width": SIDE, "steps": 2, "placement": FLOAT32, **settings}
    return DiffusersRenderer(load(name), Rendering(guidance=guidance, **settings), negative)


def guided(name, guidance, **settings):
    """With a negative of seven tokens: neither the longest nor the shortest."""
    return renderer_of(name, guidance, ragged(name, [7], seed=1) if guidance > 1 else None, **settings)


# -------------------------------------------------------------------------------------------------------- embeddings


@each
def test_a_row_is_what_the_pipeline_draws_of_it_alone(name):
    condition = ragged(name)
    images = guided(name, 1.0).render(condition, SEEDS)
    assert images.shape == (4, 3, SIDE, SIDE)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    plain = load(name)
    for row, seed in enumerate(SEEDS):
        arguments = masks_of_ones(name, one_row(condition, row))
        torch.testing.assert_close(images[row], plainly(name, plain, seed, guidance=1.0, **arguments), **CLOSE)
    assert (images[0] - images[1]).abs().max() > 1e-3  # the same noise, another caption


@each
def test_guidance_is_the_pipelines_own(name):
    condition, negative = ragged(name, [7, 7]), ragged(name, [7], seed=1)
    images = renderer_of(name, 3.0, negative).render(condition, SEEDS[1:3])
    plain = load(name)
    for row, seed in enumerate(SEEDS[1:3]):
        arguments = one_row(condition, row) | one_row(negative, 0, "negative_")
        expected = plainly(name, plain, seed, guidance=3.0, **masks_of_ones(name, arguments))
        torch.testing.assert_close(images[row], expected, **CLOSE)
    assert (renderer_of(name).render(condition, SEEDS[1:3]) - images).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["sd3", "flux", "sana", "sdxl"])
def test_the_negative_may_have_another_length(name):
    condition, negative = ragged(name), ragged(name, [7], seed=1)
    images = renderer_of(name, 3.0, negative).render(condition, SEEDS)
    plain = load(name)
    mixing(name, plain, negative, [3.0])
    for row, seed in enumerate(SEEDS):
        arguments = masks_of_ones(name, one_row(condition, row))
        torch.testing.assert_close(images[row], plainly(name, plain, seed, guidance=1.0, **arguments), **CLOSE)


@each
@guided_or_not
def test_neither_padding_nor_neighbours_matter(name, guidance):
    one, condition = guided(name, guidance), ragged(name)
    together = one.render(condition, SEEDS)
    padded = pad_to_length(condition, 14)
    padded.embeds_NLD[padded.mask_NL == 0] = -50.0
    torch.testing.assert_close(one.render(padded, SEEDS), together, **CLOSE)
    for row in range(4):
        cut = EmbeddingCondition(
            condition.embeds_NLD[row : row + 1, : LENGTHS[row]],
            condition.mask_NL[row : row + 1, : LENGTHS[row]],
            None if condition.pooled_NP is None else condition.pooled_NP[row : row + 1],
        )
        torch.testing.assert_close(one.render(cut, SEEDS[row : row + 1])[0], together[row], **CLOSE)
    one.rendering = replace(one.rendering, rows=3)
    turned = one.render(condition.index([3, 1, 0, 2]), [SEEDS[row] for row in (3, 1, 0, 2)])
    torch.testing.assert_close(turned, together[[3, 1, 0, 2]], **CLOSE)


@each
def test_guidance_of_one_draws_once_and_skips_the_negative(name):
    def never():
        raise AssertionError

    one, asked = renderer_of(name, 1.0, never), []
    rows = count_rows(one.pipe)
    one.render(ragged(name), SEEDS)
    assert sum(rows) == 2 * 4
    rows.clear()
    one.rendering = replace(one.rendering, guidance=2.0, rows=2)
    one.negative = lambda: asked.append(1) or ragged(name, [3])
    one.render(ragged(name), SEEDS)
    assert sum(rows) == 2 * 4 * 2
    assert len(asked) == 1  # for both micro-batches


@each
@guided_or_not
def test_the_gradient_reaches_every_token_and_nothing_else(name, guidance):
    one, condition = guided(name, guidance), ragged(name)
    embeds = condition.embeds_NLD.clone().requires_grad_()
    images = one.render(EmbeddingCondition(embeds, condition.mask_NL, condition.pooled_NP), SEEDS, grad=True)
    torch.testing.assert_close(images.detach(), one.render(condition, SEEDS), **CLOSE)
    images.square().sum().backward()
    real = condition.mask_NL.bool()
    assert (embeds.grad[real].abs().sum(-1) > 0).all()
    assert embeds.grad[~real].abs().max() == 0
    parts = [*one.modules(), *text_encoders_of(one.pipe).values()]
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())


@each
def test_the_scheduler_is_fresh_in_every_call(name):
    one, condition = renderer_of(name, steps=3), ragged(name)
    before = copy.deepcopy(vars(one.pipe.scheduler))
    first = one.render(condition, SEEDS)
    assert repr(vars(one.pipe.scheduler)) == repr(before)
    assert torch.equal(one.render(condition, SEEDS), first)


@each
def test_text_encoders_can_be_elsewhere(name):
    one, condition = renderer_of(name), ragged(name)
    expected = one.render(condition, SEEDS)
    assert len(one.modules()) == 2
    readers = text_encoders_of(one.pipe)
    for reader in readers.values():
        reader.to("meta")
    assert torch.equal(one.render(condition, SEEDS), expected)
    assert text_encoders_of(one.pipe) == readers


# -------------------------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", PIPELINES)
def test_text_goes_to_the_pipelines_own_encoders(name):
    images = renderer_of(name).render(TextCondition(TEXTS), SEEDS)
    plain = load(name)
    for row, seed in enumerate(SEEDS):
        expected = plainly(name, plain, seed, guidance=1.0, prompt=TEXTS[row])
        torch.testing.assert_close(images[row], expected, **CLOSE)
    assert (images[0] - images[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", PIPELINES)
def test_guidance_on_text_has_the_default_negative_or_the_given_one(name):
    plain = load(name)
    if name not in REAL_GUIDANCE:  # these have a negative of their own
        images = renderer_of(name, 3.0).render(TextCondition(TEXTS[:2]), SEEDS[:2])
        expected = plainly(name, plain, SEEDS[1], guidance=3.0, prompt=TEXTS[1])
        torch.testing.assert_close(images[1], expected, **CLOSE)
    if name != "omnigen":
        images = renderer_of(name, 3.0, TextCondition(["ugly"])).render(TextCondition(TEXTS[:2]), SEEDS[:2])
        expected = plainly(name, plain, SEEDS[1], guidance=3.0, prompt=TEXTS[1], negative_prompt="ugly")
        torch.testing.assert_close(images[1], expected, **CLOSE)


# ----------------------------------------------------------------------------------------------------------- loading


def test_parts_are_replaced_or_left_out():
    absent = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    transformer = load("sd3").transformer
    pipe = load_pipeline(str(folder("sd3")), Placement("bfloat16"), transformer=transformer, **absent)
    assert pipe.transformer is transformer
    assert not text_encoders_of(pipe)
    assert pipe.vae.dtype == torch.bfloat16
    assert pipe.scheduler.config.shift == 3.0  # the checkpoint's


def test_what_is_missing_is_named(tmp_path):
    shutil.copytree(folder("sana"), tmp_path / "sana")
    shutil.rmtree(tmp_path / "sana" / "vae")
    with pytest.raises(FileNotFoundError, match=r"sana lacks the subfolder vae; .*change model.init_args.system.init_args.pipeline"):
        load_pipeline(str(tmp_path / "sana"), FLOAT32)
    load_pipeline(str(tmp_path / "sana"), FLOAT32, vae=load("sana").vae)
    with pytest.raises(ValueError, match="has no component unet; allowed: scheduler, text_encoder"):
        load_pipeline(str(tmp_path / "sana"), FLOAT32, unet=None)
    (tmp_path / "sana" / "model_index.json").unlink()
    with pytest.raises(FileNotFoundError, match="no model_index.json, .* change x.y"):
        load_pipeline(str(tmp_path / "sana"), FLOAT32, key="x.y")


@pytest.mark.parametrize("name", PIPELINES)
def test_rehearsal_pipelines_are_the_same_at_every_writing(name, tmp_path):
    state = torch.get_rng_state()
    PIPELINES[name](tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    again, once = load_pipeline(str(tmp_path), FLOAT32), load(name)
    for one, other in zip(denoiser_of(again).parameters(), denoiser_of(once).parameters(), strict=True):
        assert torch.equal(one, other)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == type(once).__name__
