import ast
import json
import random
import re
from pathlib import Path

import pytest
import torch

from uae.miniature import tiny
from uae.miniature.metrics.scenes import agreement
from uae.miniature.scenes import WORDS, describe, detect, parse, render, sample_scene, scene_of
from uae.types import Sampling
from uae.weights.checksums import checksums, verify

MEGABYTE = 2**20


# ---------------------------------------------------------------------------------------------------- checksums


@pytest.fixture
def folder(tmp_path):
    """Three files and their checksums."""
    for name in ("captioner/model", "clip/open_clip_model", "decoder/vae/diffusion_pytorch_model"):
        file = tmp_path / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(name.encode() * 1000)
    (tmp_path / "checksums.json").write_text(json.dumps(checksums(tmp_path)))
    verify(tmp_path)
    return tmp_path


def test_checksums_are_of_every_weight_file(folder):
    names = ["captioner/model", "clip/open_clip_model", "decoder/vae/diffusion_pytorch_model"]
    assert list(json.loads((folder / "checksums.json").read_text())) == [f"{name}.safetensors" for name in names]


def test_a_changed_byte_is_noticed(folder):
    file = folder / "captioner/model.safetensors"
    content = bytearray(file.read_bytes())
    content[1234] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"differ from checksums.json: captioner/model.safetensors; run `make pretrain`"):
        verify(folder)


def test_a_missing_file_is_noticed(folder):
    (folder / "clip/open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="clip/open_clip_model.safetensors;"):
        verify(folder)


def test_a_file_too_many_is_noticed(folder):
    (folder / "clip/another.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="clip/another.safetensors;"):
        verify(folder)


def test_no_weights_at_all_say_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="make pretrain.*model.init_args.system.init_args.weights"):
        tiny.Tiny(weights=str(tmp_path)).build()


# ----------------------------------------------------------------------------------------------------- the language


def test_every_word_is_one_token_and_captions_survive_them():
    words, rng = tiny.tokenizer(), random.Random(0)
    assert len({words.convert_tokens_to_ids(word) for word in WORDS}) == len(WORDS)
    assert words.unk_token_id not in {words.convert_tokens_to_ids(word) for word in tiny.VOCABULARY[:-1] if word != tiny.UNKNOWN}
    for _ in range(200):
        caption = describe(sample_scene(rng))
        ids = words(caption, add_special_tokens=False)["input_ids"]
        assert len(ids) == len(caption.split())
        assert words.decode(ids) == caption


def test_an_image_is_one_token_per_cell():
    inputs = tiny.processor()(text=["<|image_pad|>"], images=[torch.zeros(3, 24, 24, dtype=torch.uint8)], return_tensors="pt")
    assert inputs["input_ids"].tolist() == [[tiny.VOCABULARY.index(tiny.IMAGE)] * 9]


# ------------------------------------------------------------------------------------------------- save and load


def test_a_decoder_is_loaded_as_it_was_saved(tmp_path):
    torch.manual_seed(0)
    conditioner, renderer = tiny.create_decoder(width=32, layers=1)
    tiny.save_decoder(tmp_path, conditioner.eval(), renderer.pipe.transformer)
    renderer.pipe.vae.save_pretrained(tmp_path / "vae")
    renderer.pipe.transformer.float()  # what was written is rounded to half precision; in memory it is then, too
    for steps, guidance in ((2, 1.0), (3, 2.0)):
        again, loaded = tiny.load_decoder(tmp_path, steps, guidance)
        same = tiny.assemble_renderer(conditioner, renderer.pipe.transformer, renderer.pipe.vae, steps, guidance)
        texts = ["a red square", "a tiny pink ring at top left"]
        with torch.no_grad():
            expected = same.render(conditioner.encode(texts), [1, 2])
            # Weights in a mapped file lie at other addresses, for which some processors add in another order.
            torch.testing.assert_close(loaded.render(again.encode(texts), [1, 2]), expected, atol=1e-5, rtol=0)
        for mine, theirs in ((again, conditioner), (loaded.pipe.transformer, same.pipe.transformer)):
            assert all(torch.equal(mine.state_dict()[name], value) for name, value in theirs.state_dict().items())
        assert not any(p.requires_grad for p in again.parameters())


# -------------------------------------------------------------------------------------------- the package's weights


@pytest.fixture(scope="module")
def umm():
    return tiny.Tiny().build()


@pytest.fixture(scope="module")
def scenes():
    return [scene_of(i, "test") for i in range(96)]


def test_the_weights_are_complete_and_small():
    parts = ["captioner/model", "clip/open_clip_model", "decoder/projector", "decoder/reader/model",
             "decoder/transformer/diffusion_pytorch_model", "decoder/vae/diffusion_pytorch_model", "judge/model"]  # fmt: skip
    verify(tiny.WEIGHTS)
    assert list(checksums(tiny.WEIGHTS)) == [f"{part}.safetensors" for part in parts]
    assert sum(file.stat().st_size for file in tiny.WEIGHTS.rglob("*") if file.is_file()) <= 25 * MEGABYTE


def test_the_weights_are_part_of_the_package():
    project = (Path(tiny.__file__).parents[2] / "pyproject.toml").read_text()
    patterns = ast.literal_eval(re.search(r"(?s)package-data\]\nuae = (\[.*?\])", project).group(1))
    packaged = {file for pattern in patterns for file in Path(tiny.__file__).parents[1].glob(pattern)}
    assert {file for file in tiny.WEIGHTS.rglob("*") if file.is_file()} <= packaged


@torch.no_grad()
def test_the_captioner_starts_valid_terse_and_mostly_right(umm, scenes):
    context = umm.captioner.prepare(render(scenes))
    rollout = umm.captioner.sample(context, 2, Sampling(1.0, 32), range(192))
    torch.testing.assert_close(umm.captioner.logprobs(rollout), rollout.logp_RS, atol=1e-4, rtol=0)
    assert sum(parse(text) is not None for text in rollout.texts) >= 0.9 * 192
    words = sum(len(text.split()) for text in rollout.texts) / 192
    assert 4 < words < 14  # there is room to say more


@torch.no_grad()
def test_the_decoder_draws_what_detailed_captions_say(umm, scenes):
    images = umm.renderer.render(umm.conditioner.encode([describe(scene) for scene in scenes]), range(96))
    assert 0.25 < agreement(detect(images), scenes)["whole"] < 0.6  # as reliable as the captions it learned from
    others = umm.renderer.render(umm.conditioner.encode([describe(scene) for scene in scenes[1:] + scenes[:1]]), range(96))
    assert agreement(detect(others), scenes)["whole"] < 0.05


@torch.no_grad()
@pytest.mark.parametrize("encoder", [tiny.TinyCLIP, tiny.TinyJudge])
def test_encoders_tell_scenes_apart(encoder, scenes):
    images = render(scenes)
    embeds = torch.nn.functional.normalize(encoder().load("cpu").embed(images), dim=1)
    torch.testing.assert_close((embeds * embeds).sum(1), torch.ones(96))
    assert (embeds * embeds.roll(1, 0)).sum(1).mean() < 0.6
