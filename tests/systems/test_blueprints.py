"""Architectures without weights have the published sizes, and come from the place their checkpoint would."""

import json

import pytest
import torch

from tests.models import families
from uae.systems import blueprints
from uae.systems.blueprints import config_of, encoder_skeleton, pipeline_skeletons, published, vlm_skeleton
from uae.systems.x_omni import XOmni

CAPTIONERS = {  # parameters on the model's page: everything, tied embeddings once
    "Qwen/Qwen2.5-VL-3B-Instruct": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B-Instruct": 8_292_166_656,
    "Qwen/Qwen3-VL-4B-Instruct": 4.44e9,
    "OpenGVLab/InternVL3-1B-hf": 0.94e9,
    "OpenGVLab/InternVL3-2B-hf": 2.09e9,
    "deepseek-community/Janus-Pro-1B": 2_076_636_811,
    "deepseek-community/Janus-Pro-7B": 7_407_773_323,
    "BAAI/Emu3-Gen-hf": 8_492_011_520 + 0.271e9,  # language model, from its sizes; vision tokenizer
}
OWN = {"ByteDance-Seed/BAGEL-7B-MoT", "OmniGen2/OmniGen2"}  # in the tests of these models
X_OMNI = {  # from layer sizes, by hand; the released files have not been seen. Width 3584, 4 groups of 128, 18944 inside
    "policy": 36 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3584 + 2 * 512 + 3 * 3584 * 18944 + 2 * 3584)
    + 2 * (152064 + 16448) * 3584 + 2 * 3584,
    "image tokenizer": 1.16e9 + 0.125e9, "transformer": 11.9e9, "map of features": 1536 * 3072,
    "text_encoder": 123.06e6, "text_encoder_2": 4.762e9, "vae": 83.8e6,
}  # fmt: skip
CLIP_L, CLIP_G, T5 = 123.65e6, 694.7e6, 4.762e9  # text sides with their projections; the encoder half of T5-XXL v1.1
SD3 = {"text_encoder": CLIP_L, "text_encoder_2": CLIP_G, "text_encoder_3": T5, "vae": 83.8e6}
PIPELINES = {  # per part; position tables (buffers) are not counted
    "stabilityai/stable-diffusion-3.5-large": {**SD3, "transformer": 8.06e9},
    "stabilityai/stable-diffusion-3.5-medium": {**SD3, "transformer": 2.24e9},
    "black-forest-labs/FLUX.1-dev": {"text_encoder": 123.06e6, "text_encoder_2": T5, "transformer": 11.9e9, "vae": 83.8e6},
    "Efficient-Large-Model/Sana_600M_512px_diffusers": {"text_encoder": 2.614e9, "transformer": 0.59e9, "vae": 312.25e6},
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": {"text_encoder": 2.614e9, "transformer": 1.6e9, "vae": 312.25e6},
    "Qwen/Qwen-Image": {"text_encoder": 8_292_166_656, "transformer": 20.43e9, "vae": 126.9e6},
}  # fmt: skip
ENCODERS = {  # image towers, projection included
    "openai/clip-vit-large-patch14": 304e6,
    "zer0int/LongCLIP-L-Diffusers": 304e6,
    "facebook/dinov2-large": 304e6,
    "facebook/dinov3-vitl16-pretrain-lvd1689m": 303e6,
    "google/siglip2-so400m-patch16-512": 428e6,
}


def parameters(module):
    assert all(weight.is_meta for weight in module.parameters())
    return sum(weight.numel() for weight in module.parameters())


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("UAE_CHECKPOINTS", raising=False)


@pytest.mark.parametrize("name", CAPTIONERS)
def test_captioners(name):
    model = vlm_skeleton(name)
    assert parameters(model) == pytest.approx(CAPTIONERS[name], rel=0.01)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines(name):
    parts = pipeline_skeletons(name)
    assert {part: parameters(module) for part, module in parts.items()} == pytest.approx(PIPELINES[name], rel=0.01)


def test_x_omni():
    blueprint = XOmni().blueprint()
    parts = {"policy": blueprint.policy, **{name: part for name, (part, _) in blueprint.frozen.items()}}
    assert {name: parameters(part) for name, part in parts.items()} == pytest.approx(X_OMNI, rel=0.01)


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name):
    tower = encoder_skeleton(name)
    assert parameters(tower) == pytest.approx(ENCODERS[name], rel=0.01)
    assert {weight.dtype for weight in tower.parameters()} == {torch.float32}


def test_open_clip_towers_are_those_of_open_clip():
    import open_clip

    with torch.device("meta"):
        whole = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu")).visual
    tower = blueprints.open_clip_skeleton("ViT-B-32-quickgelu")
    assert parameters(tower) == parameters(whole) == pytest.approx(87.8e6, rel=0.01)


def test_nothing_kept_is_untested():
    kept = {file.stem.replace("--", "/") for file in blueprints.PUBLISHED.glob("*.json")}
    assert kept == {*CAPTIONERS, *PIPELINES, *ENCODERS, *OWN, "X-Omni/X-Omni-En"}


def test_a_folder_goes_before_what_is_kept(tmp_path, monkeypatch):
    name = "Qwen/Qwen2.5-VL-3B-Instruct"
    captioner = families.create("qwen2_5_vl")
    captioner.learner.network.model.save_pretrained(tmp_path / name)
    monkeypatch.setenv("UAE_CHECKPOINTS", str(tmp_path))
    small = vlm_skeleton(name, "float32")
    assert {key: value.shape for key, value in small.named_parameters()} == {
        key: value.shape for key, value in captioner.learner.network.model.named_parameters()
    }
    assert config_of(str(tmp_path / name)) == json.loads((tmp_path / name / "config.json").read_text())


def test_parts_can_be_left_out():
    parts = pipeline_skeletons("black-forest-labs/FLUX.1-dev", leave_out=("text_encoder", "text_encoder_2"))
    assert set(parts) == {"transformer", "vae"}


@pytest.mark.parametrize(
    ("name", "words"),
    [("nobody/nothing", "does not ship with this package"), ("./nowhere", "nothing at './nowhere'")],
)
def test_an_unknown_checkpoint_is_one_line(name, words):
    assert published(name) is None
    with pytest.raises(FileNotFoundError, match=words) as error:
        config_of(name)
    assert "\n" not in str(error.value)


def test_an_incomplete_folder_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no transformer/config\.json in"):
        blueprints.denoiser_skeleton(str(tmp_path))
