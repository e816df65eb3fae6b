"""Captioners from checkpoint folders, and what is said of folders that hold none."""

import copy
import json
import shutil
import socket
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import families
from uae.models.captioners.loading import Reading, assemble_captioner, load_captioner
from uae.models.finetune import LoRA
from uae.types import Sampling

EXACT = Reading(dtype="float32")
TOLERANCE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="session")
def folders(created, tmp_path_factory):
    """Checkpoints by family, as transformers writes them, made on demand. Not to be changed."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family):
        path = root / family
        if not path.exists():
            captioner = created(family)
            captioner.learner.network.model.save_pretrained(path)
            captioner.processor.save_pretrained(path)
        return path

    return folder


@pytest.fixture
def folder(folders, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(folders("qwen2_5_vl"), tmp_path / "captioner")


def load(path, reading=EXACT, **settings):
    captioner = load_captioner(str(path), reading, "describe", **settings)
    captioner.end_ids += [families.IDS[word] for word in ("and", "gray", "tiny", "ring")]  # as in the families
    return captioner


@pytest.mark.parametrize("family", families.FAMILIES)
@torch.no_grad()
def test_a_checkpoint_is_the_captioner_that_was_saved(created, folders, images, family):
    saved, loaded = created(family), load(folders(family))
    if family == "qwen3_5":  # its model type makes the library read whole words as byte pairs
        loaded.processor = saved.processor
    assert loaded.prompt("describe") == saved.prompt("describe")
    assert torch.equal(loaded.learner.network.banned_ids, saved.learner.network.banned_ids)
    rollout = loaded.sample(loaded.prepare(images), 6, Sampling(0.7, 8), range(12))
    expected = saved.sample(saved.prepare(images), 6, Sampling(0.7, 8), range(12))
    assert rollout.texts == expected.texts
    assert torch.equal(rollout.logp_RS, expected.logp_RS)
    assert torch.equal(loaded.logprobs(rollout), saved.logprobs(expected))
    torch.testing.assert_close(loaded.logprobs(rollout), rollout.logp_RS, **TOLERANCE)  # two sizes, early and late ends
    torch.testing.assert_close(families.plain_logprobs(loaded, rollout), rollout.logp_RS, **TOLERANCE)


@pytest.mark.parametrize("family", families.FULL_ATTENTION)
def test_a_checkpoint_trains_in_bfloat16_with_all_settings(folders, images, family):
    loaded = load(folders(family), Reading(gradient_checkpointing=True, attention="eager", image_first=False))
    model = loaded.learner.network.model
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager"
    assert not model.training
    assert loaded.learner.network.gradient_checkpointing
    LoRA(rank=2).attach(loaded.learner, keep_reference=True)
    rollout = loaded.sample(loaded.prepare(images), 3, Sampling(1.0, 6), range(6))
    with torch.no_grad():
        old_NT = loaded.logprobs(rollout)
        with loaded.learner.reference():
            assert torch.equal(loaded.logprobs(rollout), old_NT)
    new_NT = loaded.logprobs(rollout)
    assert torch.equal(new_NT.detach(), old_NT)
    new_NT.sum().backward()
    trained = [p for p in loaded.learner.network.parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert len(trained) == 2 * 7  # B of every map; A once B has moved


def test_a_reading_wins_over_the_system(folders):
    path = folders("qwen2_5_vl")
    plain = load(path)
    assert (plain.instruction, plain.image_first) == ("describe", True)
    assert not load(path, image_first=False).image_first
    own = load(path, Reading(dtype="float32", instruction="red", image_first=True), image_first=False)
    assert (own.instruction, own.image_first) == ("red", True)
    assert load(path, Reading(dtype="float32", image_first=False)).image_first is False


def test_a_checkpoint_below_the_mirror(folders, monkeypatch):
    path = folders("llava")
    monkeypatch.setenv("UAE_CHECKPOINTS", str(path.parent.parent))
    assert load(f"{path.parent.name}/llava").learner.network.base.config.model_type == "llava"


def test_model_and_processor_in_two_folders(folder, folders, tmp_path):
    """As UAE publishes them; its model folder also holds weights of other parts."""
    (tmp_path / "model").mkdir()
    weights = load_file(folder / "model.safetensors") | {"projector.0.weight": torch.zeros(2, 2)}
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").unlink()
    for file in ("config.json", "generation_config.json"):
        (folder / file).rename(tmp_path / "model" / file)
    parts, whole = load(tmp_path / "model", processor_name=str(folder)), load(folders("qwen2_5_vl"))
    assert parts.prompt("describe") == whole.prompt("describe")
    mine, theirs = parts.learner.network.state_dict(), whole.learner.network.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_no_network_is_asked(folders, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("a connection was opened"))
    load(folders("internvl"))


# ------------------------------------------------------------------------------------------------------------ pixels


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_pixel_budget_bounds_the_image_tokens(folders, family):
    square = [torch.rand(3, 64, 64)]

    def tokens(**budget):
        captioner = load(folders(family), Reading(dtype="float32", **budget))
        return int((captioner.prepare(square).rows["input_ids"] == families.IDS["<|image_pad|>"]).sum())

    assert tokens() == 16  # the checkpoint's at most 24 x 48 pixels: 32 x 32, of 8 x 8 per token
    assert tokens(max_pixels=24 * 24) == 9
    assert tokens(min_pixels=48 * 48, max_pixels=48 * 48) == 36
    assert tokens(max_pixels=64 * 64) == 64


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"min_pixels": 2000}, "between 2000 and 1152 pixels"),
        ({"max_pixels": 100}, "between 576 and 100 pixels"),
        ({"min_pixels": -1}, "between -1 and 1152 pixels"),
    ],
)
def test_an_impossible_pixel_budget_is_refused(folders, budget, message):
    with pytest.raises(ValueError, match=rf"{message}.*min_pixels <= max_pixels.*model.init_args.system.init_args.reading"):
        load(folders("qwen2_5_vl"), Reading(**budget))


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("key", ["min_pixels", "max_pixels"])
def test_a_pixel_budget_without_a_use_is_refused(folders, family, key):
    with pytest.raises(ValueError, match=rf"reading.{key}=576, but .*ImageProcessor has no pixel budget; remove"):
        load(folders(family), Reading(**{key: 576}))


# ------------------------------------------------------------------------------------------------------------ errors


def refusal(path, reading=EXACT):
    """The one line that is said."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load(path, reading)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 450
    return message


def test_nothing_there(tmp_path):
    assert "nothing at" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "processor_config.json"])
def test_a_missing_file(folder, file):
    (folder / file).unlink()
    assert "system.init_args.captioner" in refusal(folder)


def test_a_missing_chat_template(folder):
    (folder / "chat_template.jinja").unlink()
    assert "no chat template: set model.init_args.system.init_args.captioner" in refusal(folder)


def test_a_torn_file(folder):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "cannot be read as a vision-language model" in refusal(folder)


def test_a_missing_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights[next(name for name in weights if "layers.1.mlp.up_proj" in name)]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = refusal(folder)
    assert "lacks 1 weights" in message
    assert "layers.1.mlp.up_proj.weight" in message


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 8
    (folder / "config.json").write_text(json.dumps(config))
    message = refusal(folder)
    assert "lacks 6 weights" in message
    assert "in other shapes" in message


def test_a_text_model(tmp_path, created):
    from transformers import Qwen2ForCausalLM

    Qwen2ForCausalLM(families.text_config(1)).save_pretrained(tmp_path)
    created("qwen2_5_vl").processor.save_pretrained(tmp_path)
    assert "cannot be read as a vision-language model" in refusal(tmp_path)


def test_an_unknown_attention(folder):
    expected = "correct captioner or reading.attention of model.init_args.system.init_args"
    assert expected in refusal(folder, replace(EXACT, attention="no"))


def test_a_memory_that_cannot_be_continued(created):
    captioner = created("qwen3_5")
    model, words = captioner.learner.network.model, captioner.processor
    with pytest.raises(ValueError, match=r"reading.gradient_checkpointing=true, but Qwen3_5.*linear attention"):
        assemble_captioner(model, words, Reading(gradient_checkpointing=True), "describe")
    model = copy.deepcopy(created("llava").learner.network.model)
    model.config.text_config.layer_types = ["indexed_attention", "full_attention"]
    with pytest.raises(ValueError, match=r"DynamicIndexedLayer.*system.init_args.captioner to another model"):
        assemble_captioner(model, created("llava").processor, Reading(), "describe")
    model.config.text_config.cross_attention_layers = [1]
    with pytest.raises(ValueError, match=r"layers of cross-attention.*system.init_args.captioner to another model"):
        assemble_captioner(model, created("llava").processor, Reading(), "describe")
