"""OmniGen2 from a checkpoint in the official layout: assembled, trained through the command line, exported, read again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.models.omnigen2.conftest import CLIP, OFFICIAL
from tests.systems.test_fit import CONFIGS, networks
from uae import cli
from uae.check.parts import guidance
from uae.check.parts.verdicts import Precision
from uae.memory import estimates, flops
from uae.models.captioners.loading import Reading
from uae.models.renderers.diffusers import Rendering
from uae.systems.omnigen2 import OmniGen2
from uae.types import Sampling
from uae.weights.placement import Placement
from uae.weights.state import read_state

ENCODER = {"class_path": "uae.encoders.HFEncoder", "init_args": {"path": CLIP}}
SYSTEM = "You are a helpful assistant that generates high-quality images based on user instructions."
SCORE = {"class_path": "uae.metrics.UnifiedScore", "init_args": {"encoders": {"clip": ENCODER}, "held_out": ["clip"]}}


def fit(finetune, train):
    """Three steps of the shipped configuration."""
    delta = {"model": {"init_args": {"unified_score": SCORE, "sampling": {"max_tokens": 6}}}}
    Path("delta.yaml").write_text(yaml.safe_dump(delta))
    files = [CONFIGS / f"finetune/{finetune}_pretrained.yaml"]
    if train == "both":
        files += [CONFIGS / "stages/joint.yaml", *([CONFIGS / "finetune/images_full.yaml"] if finetune == "full" else [])]
    files = [CONFIGS / "omnigen2.yaml", *files, CONFIGS / "debug/rehearsal.yaml", "delta.yaml"]
    words = [word for file in files for word in ("--config", str(file))]
    rates = ["--model.init_args.optimizer.init_args.lr=0.01", *(["--model.init_args.image_lr=0.01"] if train == "both" else [])]
    few = ["--model.init_args.reconstructions=2"] if train == "both" else []
    return cli.main(["fit", *words, *rates, *few])


def small(name=OFFICIAL, **settings):
    drawing = Rendering(32, 32, steps=2, guidance=4.0, rows=2, placement=Placement("float32"))
    return OmniGen2(name, **{"reading": Reading(dtype="float32"), "rendering": drawing, **settings})


def plain(network):
    """Every tensor below an adapter, by its own name."""
    state = network.base.state_dict()
    return {key.replace(".base_layer.", "."): value for key, value in state.items() if "lora_" not in key}


@pytest.mark.parametrize(("finetune", "train"), [("lora", "captions"), ("lora", "both"), ("full", "both")])
def test_three_steps(run_here, folder, finetune, train):
    """What does not train keeps its bytes; the exports are in the official layouts, or adapters for them."""
    run = fit(finetune, train)
    assert run.trainer.global_step == 3
    trained, start, export = run.model.umm, small().build(), Path("outputs/omnigen2/export").resolve()
    captions, denoiser = trained.captioner.learner.network, start.renderer.pipe.transformer
    first = start.captioner.learner.network.base.state_dict()
    moved = {name for name, value in first.items() if not torch.equal(value, plain(captions)[name])}
    assert bool(moved) == (finetune == "full")
    assert not [name for name in moved if "visual" in name]
    if train == "captions":
        for part, network in networks(start).items():
            now = networks(trained)[part].state_dict()
            assert all(torch.equal(value, now[key]) for key, value in network.state_dict().items()), part
    else:
        images = trained.renderer.learner.network
        changed = {name for name, value in denoiser.state_dict().items() if not torch.equal(value, plain(images)[name])}
        assert bool(changed) == (finetune == "full")
        assert not [name for name in changed if "ref_image" in name or "image_index" in name]
    if finetune == "lora":
        for place, part in ((export, "mllm"), *(((export / "renderer", "transformer"),) if train == "both" else ())):
            config = json.loads((place / "adapter_config.json").read_text())
            assert config["base_model_name_or_path"] == str(folder / part)
        return
    again = Path(shutil.copytree(folder, "again"))  # the official folder, with what was exported in its place
    shutil.rmtree(again / "mllm")
    shutil.copytree(export, again / "mllm", ignore=shutil.ignore_patterns("renderer"))
    if train == "both":
        official = read_state(folder / "transformer")
        assert {name: value.shape for name, value in read_state(export / "renderer").items()} == {
            name: value.shape for name, value in official.items()
        }
        shutil.rmtree(again / "transformer")
        shutil.copytree(export / "renderer", again / "transformer")
    loaded = small(str(again.resolve())).build()
    assert all(torch.equal(value, plain(captions)[name]) for name, value in plain(loaded.captioner.learner.network).items())
    drawing = plain(trained.renderer.learner.network) if train == "both" else denoiser.state_dict()
    assert all(torch.equal(value, drawing[name]) for name, value in loaded.renderer.pipe.transformer.state_dict().items())


@torch.no_grad()
def test_captions_are_read_as_by_the_library(run_here, folder):
    """All states of the chat of system message and caption; captions of other lengths in the call change nothing."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    umm = small(negative_prompt="blurry").build()
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "mllm", dtype=torch.float32)
    words = AutoProcessor.from_pretrained(folder / "processor").tokenizer
    captions = ["a red square", "A tiny blue ring at the top left, and a white cross."]
    found, negative = umm.conditioner.encode(captions), umm.renderer.negative()
    for row, (caption, condition) in enumerate([*((text, found) for text in captions), ("blurry", negative)]):
        turns = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": caption}]
        text = words.apply_chat_template(turns, tokenize=False, add_generation_prompt=False)
        expected = model(**words(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0]
        states = condition.embeds_NLD[row % 2][condition.mask_NL[row % 2].bool()]
        torch.testing.assert_close(states, expected, atol=1e-5, rtol=0)


def test_images_are_asked_about_as_officially(run_here, folder):
    """Under the system message, with the images' name; the token that asks to draw is never sampled."""
    captioner = small(reading=Reading(dtype="float32", instruction="What is it?")).build().captioner
    start = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    ask = "<|im_start|>user\n<img1>: <|vision_start|><|image_pad|><|vision_end|>What is it?<|im_end|>\n<|im_start|>assistant\n"
    assert captioner.prompt("What is it?") == start + ask
    draws = captioner.processor.tokenizer.convert_tokens_to_ids("<|img|>")
    context = captioner.prepare(torch.rand(1, 3, 56, 56, generator=torch.Generator().manual_seed(0)))
    rollout = captioner.sample(context, 100, Sampling(50.0, 4), range(100))
    assert draws is not None
    assert not (rollout.tokens_NT == draws)[rollout.mask_RS.bool()].any()


@torch.no_grad()
def test_guidance_is_checked_where_it_matters(run_here, folder):
    """Where the caption is the negative prompt, its share of the velocity is rounding, which says nothing of guidance."""
    umm = small(negative_prompt="").build()
    verdicts = [guidance.value(umm.renderer, umm.conditioner.encode([text]), Precision(True)).verdict for text in ("", "a red cat")]
    assert verdicts == ["not applicable", "passed"]


def test_published_sizes(monkeypatch):
    """The language model of 3 billion, the transformer of 4 billion weights as its authors count, and FLUX's autoencoder."""
    monkeypatch.delenv("UAE_CHECKPOINTS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blueprint = OmniGen2().blueprint()
    sizes = {name: sum(value.numel() for value in part.state_dict().values()) for name, (part, _) in blueprint.frozen.items()}
    assert sizes == pytest.approx({"transformer": 3.97e9, "vae": 83.8e6}, rel=0.01)
    assert sum(weight.numel() for weight in blueprint.policy.parameters()) == pytest.approx(3_754_622_976, rel=0.01)
    (transformer, _), (vae, _) = blueprint.frozen["transformer"], blueprint.frozen["vae"]
    assert {weight.dtype for weight in transformer.parameters()} == {torch.bfloat16}
    rendering, layers = Rendering(), sum(weight.numel() for weight in transformer.layers.parameters() if weight.ndim > 1)
    assert flops.denoiser_flop(transformer, vae, rendering, 256) == pytest.approx(2 * layers * (32 * 32 + 256), rel=0.15)
    one = estimates.denoise_bytes(transformer, vae, rendering, 1, 256)
    assert one == 11 * 2 * 2520 * (32 * 32 + 256)


def test_a_damaged_checkpoint_is_named(folder, tmp_path):
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (file,) = [one for one in (damaged / "transformer").glob("*.safetensors") if "x_embedder.weight" in load_file(one)]
    save_file({name: value for name, value in load_file(file).items() if name != "x_embedder.weight"}, file)
    with pytest.raises(ValueError, match=r"transformer does not fit OmniGen2\w*: missing 1 of x_embedder"):
        small(str(damaged)).build()
    (damaged / "transformer/config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no config.json in .*transformer.*change model.init_args.*checkpoint"):
        small(str(damaged)).build()
    shutil.rmtree(damaged / "vae")
    with pytest.raises(FileNotFoundError, match=r"lacks vae; model.init_args.system.init_args.checkpoint must be a folder with mllm"):
        small(str(damaged)).build()
