import ast
import copy
import json
import random
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from uae.miniature import tiny, tiny_janus
from uae.miniature.metrics.scenes import agreement
from uae.miniature.scenes import WORDS, describe, detect, parse, render, sample_scene, scene_of
from uae.miniature.scenes.world import KINDS, cell_pictures
from uae.models.tokens.policy import TokenSampling
from uae.types import Sampling
from uae.weights.checksums import checksums, verify

MEGABYTE = 2**20


@pytest.fixture(scope="module")
def umm():
    return tiny_janus.TinyJanus().build()


@pytest.fixture(scope="module")
def scenes():
    return [scene_of(i, "test") for i in range(128)]


# ----------------------------------------------------------------------------------------------------- the languages


def test_every_word_is_one_token_and_captions_survive_them():
    words, rng = tiny_janus.tokenizer(), random.Random(0)
    ids = words.convert_tokens_to_ids(tiny_janus.VOCABULARY)
    assert ids == list(range(len(tiny_janus.VOCABULARY)))
    assert set(WORDS) < set(tiny_janus.VOCABULARY)
    for _ in range(200):
        caption = describe(sample_scene(rng))
        ids = words(caption)["input_ids"]  # nothing is put around it
        assert len(ids) == len(caption.split())
        assert words.unk_token_id not in ids
        assert words.decode(ids) == caption


def test_codes_are_pictures_of_cells(scenes):
    codes = tiny_janus.scene_codes(scenes)
    assert codes.max() < tiny_janus.CODES == cell_pictures().flatten(0, 1).shape[0]
    for image, row in zip(render(scenes), codes.tolist(), strict=True):
        for cell, code in enumerate(row):
            y, x = 8 * (cell // 3), 8 * (cell % 3)
            assert torch.equal(image[:, y : y + 8, x : x + 8], cell_pictures()[code // KINDS, code % KINDS])


def test_codes_start_alike_where_they_share_attributes():
    torch.manual_seed(0)
    inner = tiny_janus.create(width=32, layers=1).model
    tables = (
        inner.vqmodel.quantize.embedding.weight,
        inner.generation_embeddings.weight,
        inner.generation_head.vision_head.weight,
    )
    for table in tables:
        unit = torch.nn.functional.normalize(table.detach(), dim=1)
        objects = unit.view(4, KINDS, -1)[:, 1:].reshape(4, 12, 8, -1)  # backgrounds, shapes and sizes, colors
        alike = [(objects * objects.roll(1, axis)).sum(-1).mean() for axis in (0, 2)]
        assert all(0.65 < cosine < 0.85 for cosine in alike)  # three of four attributes are shared
        assert (objects * objects.roll((1, 5, 1), (0, 1, 2))).sum(-1).mean() < 0.35  # at most one
        assert len(torch.unique(table.round(decimals=4), dim=0)) == tiny_janus.CODES


def test_the_prompt_of_an_image_is_the_processors_own():
    words = tiny_janus.processor()
    conditioner = tiny_janus.assemble(tiny_janus.create(32, 1), words, TokenSampling(1.0)).conditioner
    captions = ["a red ring", "a tiny pink cross at top left and a blue square on a gray background"]
    condition = conditioner.encode(captions)
    for n, caption in enumerate(captions):
        turn = [{"role": "user", "content": [{"type": "text", "text": caption}]}]
        prompt = words.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        expected = words(text=[prompt], generation_mode="image", return_tensors="pt")["input_ids"][0]
        mask = condition.mask_NL[n].bool()
        assert torch.equal(condition.ids_NL[n][mask], expected)
        empty = [tiny_janus.BEGIN, *[tiny_janus.PAD] * (len(expected) - 2), tiny_janus.IMAGE_BEGIN]
        assert words.tokenizer.convert_ids_to_tokens(condition.uncond_ids_NL[n][mask]) == empty
    assert conditioner.truncated == 0
    longest = max((describe(scene_of(i, counts=(3,))) for i in range(50)), key=lambda text: len(text.split()))
    conditioner.encode([longest])
    assert conditioner.truncated == 0


def test_an_image_is_nine_tokens_and_its_pixels_are_left_alone():
    image = torch.randint(0, 256, (3, 24, 24), dtype=torch.uint8)
    inputs = tiny_janus.processor()(text=[tiny_janus.IMAGE], images=[image], return_tensors="pt")
    names = tiny_janus.tokenizer().convert_ids_to_tokens(inputs["input_ids"][0])
    assert names == [tiny_janus.IMAGE_BEGIN, *[tiny_janus.IMAGE] * 9, tiny_janus.IMAGE_END]
    torch.testing.assert_close(inputs["pixel_values"][0], image / 127.5 - 1, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------------------------- save and load


@torch.no_grad()
def test_a_janus_is_loaded_as_it_was_saved(tmp_path):
    from transformers import AutoModelForImageTextToText

    torch.manual_seed(0)
    model = tiny_janus.create(width=32, layers=1)
    tiny_janus.save(tmp_path, model)
    loaded, words = tiny_janus.load(tmp_path)
    by_name = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    for other in (loaded, by_name):
        assert other.dtype == torch.float32
        expected = model.float().state_dict()  # what was written is rounded to half precision; in memory it is then, too
        assert other.state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    assert words.chat_template == tiny_janus.CHAT_TEMPLATE
    assert loaded.generation_config.generation_kwargs == {
        "boi_token_id": words.tokenizer.convert_tokens_to_ids(tiny_janus.IMAGE_BEGIN)
    }


def test_the_systems_settings_arrive(tmp_path):
    tiny_janus.save(tmp_path, tiny_janus.create(width=32, layers=1))
    (tmp_path / "checksums.json").write_text(json.dumps(checksums(tmp_path)))
    umm = tiny_janus.TinyJanus(str(tmp_path), guidance=2.5, cfg_logprob="guided_detach_uncond").build()
    assert umm.renderer.sampling == TokenSampling(2.5, 1.0, "guided_detach_uncond")
    assert umm.captioner.learner.network is umm.renderer.learner.network
    assert umm.captioner.learner.network.base.config.text_config.hidden_size == 32
    with (tmp_path / "model.safetensors").open("ab") as file:
        file.write(b"!")
    with pytest.raises(ValueError, match="differ from checksums.json: model.safetensors"):
        tiny_janus.TinyJanus(str(tmp_path)).build()


# -------------------------------------------------------------------------------------------- the package's weights


def test_the_weights_are_complete_and_small():
    verify(tiny_janus.WEIGHTS)
    assert list(checksums(tiny_janus.WEIGHTS)) == ["model.safetensors"]
    files = {file for file in tiny_janus.WEIGHTS.rglob("*") if file.is_file()}
    assert sum(file.stat().st_size for file in files) <= 12 * MEGABYTE
    project = (Path(tiny.__file__).parents[2] / "pyproject.toml").read_text()
    patterns = ast.literal_eval(re.search(r"(?s)package-data\]\nuae = (\[.*?\])", project).group(1))
    assert files <= {file for pattern in patterns for file in Path(tiny.__file__).parents[1].glob(pattern)}


@torch.no_grad()
def test_the_codes_of_a_scene_are_a_picture_of_it(umm, scenes):
    codes = tiny_janus.scene_codes(scenes)
    quantizer = umm.captioner.learner.network.base.model.vqmodel
    found = quantizer.encode(render(scenes) * 2 - 1).image_tokens.view(len(scenes), 9)
    assert (found == codes).float().mean() > 0.99
    assert agreement(detect(umm.captioner.learner.network.pixels(codes)), scenes)["whole"] > 0.97


@torch.no_grad()
def test_codes_looked_up_by_length_or_by_direction_decode_to_the_same_scene(umm, scenes):
    """transformers' ``encode`` goes by distance, its decoder and the original Janus by direction only."""
    vq = copy.deepcopy(umm.captioner.learner.network.base.model.vqmodel)
    images, codebook = render(scenes) * 2 - 1, vq.quantize.embedding.weight

    def by_direction():
        states_NSD = vq.quant_conv(vq.encoder(images)).flatten(2).mT
        return (normalize(states_NSD, dim=-1) @ normalize(codebook, dim=-1).T).argmax(-1)

    found, drawn = by_direction(), vq.decode(tiny_janus.scene_codes(scenes))
    assert (vq.encode(images).image_tokens.view(-1, 9) == found).float().mean() > 0.995
    assert agreement(detect(umm.captioner.learner.network.pixels(found)), scenes)["whole"] > 0.97
    codebook.mul_(torch.linspace(0.1, 8, len(codebook))[:, None])  # of a codebook with other lengths, only one is right
    torch.testing.assert_close(vq.decode(tiny_janus.scene_codes(scenes)), drawn, atol=1e-4, rtol=0)
    assert torch.equal(by_direction(), found)
    assert (vq.encode(images).image_tokens.view(-1, 9) == found).float().mean() < 0.8


@torch.no_grad()
def test_the_captioner_starts_valid_terse_and_mostly_right(umm, scenes):
    rollout = umm.captioner.sample(umm.captioner.prepare(render(scenes)), 2, Sampling(1.0, 32), range(256))
    torch.testing.assert_close(umm.captioner.logprobs(rollout), rollout.logp_RS, atol=1e-4, rtol=0)
    assert sum(parse(text) is not None for text in rollout.texts) >= 0.95 * 256
    words = sum(len(text.split()) for text in rollout.texts) / 256
    assert 5 < words < 11  # there is room to say more


@torch.no_grad()
def test_image_tokens_mostly_are_what_detailed_captions_say(umm, scenes):
    condition = umm.conditioner.encode([describe(scene) for scene in scenes])
    trajectory = umm.renderer.sample(condition, range(128))
    torch.testing.assert_close(umm.renderer.logprobs(trajectory), trajectory.logp_RS, atol=1e-4, rtol=0)
    seen = detect(umm.renderer.pixels(trajectory))
    assert 0.2 < agreement(seen, scenes)["whole"] < 0.6  # as reliable as the captions it learned from
    assert agreement(seen, scenes[1:] + scenes[:1])["whole"] < 0.05


@torch.no_grad()
def test_terse_captions_leave_the_rest_to_chance(umm):
    condition = umm.conditioner.encode(["a red ring"] * 96)
    seen = detect(umm.renderer.render(condition, range(96)))
    said = [any((o.color, o.shape) == ("red", "ring") for o in scene.objects) for scene in seen]
    assert sum(said) > 0.5 * 96  # of scenes at large, one in sixteen has one
    assert len({scene.background for scene in seen}) == 4
    assert len({(o.row, o.column) for scene in seen for o in scene.objects}) == 9


@torch.no_grad()
def test_transformers_own_generation_draws_the_same_image(umm, scenes):
    """Greedy, with guidance."""
    from transformers import JanusForConditionalGeneration

    model = JanusForConditionalGeneration.from_pretrained(tiny_janus.WEIGHTS, dtype=torch.float32)
    condition = umm.conditioner.encode([describe(scene) for scene in scenes[:16]])
    prompts = [row[mask.bool()] for row, mask in zip(condition.ids_NL, condition.mask_NL, strict=True)]
    for n, ids in enumerate(prompts):
        expected = model.generate(
            ids[None], attention_mask=torch.ones_like(ids)[None], generation_mode="image", do_sample=False,
            guidance_scale=2.0,
        )  # fmt: skip
        uniforms = torch.zeros(1, 9)
        sampling = TokenSampling(guidance=2.0, temperature=0.0)
        tokens, _, _ = umm.renderer.learner.network.draw(condition.index([n]), sampling, uniforms)
        assert torch.equal(tokens, expected)
