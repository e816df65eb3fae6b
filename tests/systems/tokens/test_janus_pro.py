"""Janus-Pro from checkpoints in the layout of the released ports, against transformers' own generation."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, JanusForConditionalGeneration

from uae import cli
from uae.models.captioners.loading import Reading
from uae.rehearsal.catalog import write
from uae.rehearsal.janus import JANUS
from uae.systems.blueprints import vlm_skeleton
from uae.systems.janus_pro import JanusPro, check_spaces
from uae.types import Sampling

CONFIGS = Path(__file__).parents[3] / "configs"
CLOSE = {"atol": 1e-5, "rtol": 0}
SMALL, LARGE = JANUS
FLOAT = Reading(dtype="float32")
CAPTIONS = ["a red square", 'A tiny blue ring at the top left, and a "white" cross; navy background.']
ENCODERS = ["openai/clip-vit-large-patch14", "zer0int/LongCLIP-L-Diffusers", "facebook/dinov2-large"]
ENCODERS += ["facebook/dinov3-vitl16-pretrain-lvd1689m"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Only what is needed here."""
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, [SMALL, LARGE, *ENCODERS])
    return folder


@pytest.fixture(scope="module", params=[SMALL, LARGE])
def umm(request, checkpoints):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UAE_CHECKPOINTS", str(checkpoints))
        return JanusPro(request.param, reading=FLOAT).build()


def released(umm):
    """The same checkpoint by transformers' own calls."""
    path = umm.captioner.learner.network.model.name_or_path
    return JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32), AutoProcessor.from_pretrained(path)


# -------------------------------------------------------------------------------------------------------------- parity


def test_prompts_are_those_of_the_processor(umm):
    """Left-padded there, right-padded here; the one without caption as transformers' generation makes it."""
    _, processor = released(umm)
    prompts = [f"<|User|>: {caption}\n\n<|Assistant|>:" for caption in CAPTIONS]
    theirs = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    ours, words = umm.conditioner.encode(CAPTIONS), processor.tokenizer
    for n in range(2):
        own, at = ours.mask_NL[n].bool(), theirs["attention_mask"][n].bool()
        ids_L = theirs["input_ids"][n][at]
        assert torch.equal(ours.ids_NL[n][own], ids_L)
        kept = torch.tensor([words.bos_token_id, words.convert_tokens_to_ids(words.boi_token)])
        bare_L = ids_L.masked_fill(~torch.isin(ids_L, kept), words.pad_token_id)
        assert torch.equal(ours.uncond_ids_NL[n][own], bare_L)
        assert words.decode(ids_L) == f"{words.bos_token}{prompts[n]}{words.boi_token}"


@torch.no_grad()
def test_greedy_images_equal_generate(umm):
    """Guidance 5, two prompts of different length."""
    model, processor = released(umm)
    prompts = [f"<|User|>: {caption}\n\n<|Assistant|>:" for caption in CAPTIONS]
    inputs = processor(text=prompts, generation_mode="image", padding=True, return_tensors="pt")
    model.generation_config.temperature = None
    theirs = model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=5.0)
    greedy = JanusPro(model.name_or_path, image_temperature=0.0, rows=1, reading=FLOAT).build()
    drawn = greedy.renderer.sample(greedy.conditioner.encode(CAPTIONS), [0, 1])
    assert torch.equal(drawn.actions_RS, theirs)
    assert len(theirs.unique()) > 4
    pixels = model.decode_image_tokens(theirs).permute(0, 3, 1, 2)
    torch.testing.assert_close(greedy.renderer.pixels(drawn), (pixels / 2 + 0.5).clamp(0, 1), **CLOSE)


@torch.no_grad()
def test_greedy_captions_equal_generate(umm):
    model, processor = released(umm)
    images = [torch.rand(3, 20, side, generator=torch.Generator().manual_seed(side)) for side in (20, 30)]
    content = [{"type": "image"}, {"type": "text", "text": umm.captioner.instruction}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    eight_bits = [(image * 255).round().to(torch.uint8) for image in images]
    inputs = processor(text=[prompt] * 2, images=eight_bits, padding=True, return_tensors="pt")
    assert processor.tokenizer.decode(inputs["input_ids"][0]).startswith(f"{processor.tokenizer.bos_token}You are a helpful")
    banned = umm.captioner.learner.network.banned_ids.tolist()
    ends = {"eos_token_id": umm.captioner.end_ids, "pad_token_id": umm.captioner.pad_id}
    theirs = model.generate(**inputs, **ends, do_sample=False, max_new_tokens=10, suppress_tokens=banned)
    ours = umm.captioner.sample(umm.captioner.prepare(images), 1, Sampling(0.0, 10), range(2)).tokens_NT
    assert torch.equal(ours, theirs[:, inputs["input_ids"].shape[1] :])
    marks = [processor.tokenizer.convert_tokens_to_ids(f"<{mark}>") for mark in ("begin_of_image", "end_of_image")]
    assert {*marks, model.config.image_token_id} <= set(banned)


@torch.no_grad()
def test_both_ratios_are_one(umm):
    images = [torch.rand(3, 20, side, generator=torch.Generator().manual_seed(side)) for side in (20, 30)]
    rollout = umm.captioner.sample(umm.captioner.prepare(images), 2, Sampling(1.0, 8), range(4))
    torch.testing.assert_close(umm.captioner.logprobs(rollout), rollout.logp_RS, atol=3e-5, rtol=0)
    drawn = umm.renderer.sample(umm.conditioner.encode(rollout.texts, rollout), range(4))
    torch.testing.assert_close(umm.renderer.logprobs(drawn), drawn.logp_RS, atol=3e-5, rtol=0)
    images = umm.renderer.pixels(drawn)
    assert images.shape == (4, 3, 16, 16)
    assert images.std() > 0.05


# ------------------------------------------------------------------------------------------------------ the stand-ins


@pytest.mark.parametrize("name", JANUS)
def test_stand_ins_are_in_the_released_layout(checkpoints, name):
    model, report = AutoModelForImageTextToText.from_pretrained(checkpoints / name, output_loading_info=True)
    assert isinstance(model, JanusForConditionalGeneration)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    parts = {key.split(".")[1] for key in model.state_dict() if key != "lm_head.weight"}
    assert parts == {
        "vision_model", "aligner", "vqmodel", "generation_embeddings", "generation_aligner", "generation_head", "language_model",
    }  # fmt: skip
    assert not torch.equal(model.lm_head.weight, model.get_input_embeddings().weight)
    words = json.loads((checkpoints / name / "tokenizer_config.json").read_text())
    assert words["tokenizer_class"] == "LlamaTokenizer"
    check_spaces(AutoProcessor.from_pretrained(checkpoints / name).tokenizer)


def test_the_two_sizes_pad_with_different_tokens(checkpoints):
    pads = {AutoProcessor.from_pretrained(checkpoints / name).tokenizer.pad_token_id for name in JANUS}
    assert len(pads) == 2


@pytest.mark.parametrize(("name", "size"), [(SMALL, 4.18e9), (LARGE, 14.84e9)])
def test_published_sizes(monkeypatch, name, size):
    """Bytes of the original weight files in bfloat16, which hold a pooling head more."""
    monkeypatch.delenv("UAE_CHECKPOINTS", raising=False)
    assert sum(weight.numel() for weight in vlm_skeleton(name).parameters()) * 2 == pytest.approx(size, rel=0.01)
    blueprint = JanusPro(name).blueprint()
    trained = {name.split(".")[1] for name, _ in blueprint.policy.named_parameters() if name != "lm_head.weight"}
    assert "vqmodel" not in trained
    assert blueprint.prompt_tokens > 576


# ------------------------------------------------------------------------------------------------------------ mistakes


def test_the_original_layout_is_refused_with_the_port(tmp_path):
    with pytest.raises(
        ValueError, match="set model.init_args.system.init_args.checkpoint to the port .* deepseek-community/Janus-Pro-7B"
    ):
        JanusPro("deepseek-ai/Janus-Pro-7B").build()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "multi_modality"}))
    (tmp_path / "pytorch_model-00001-of-00002.bin").touch()
    for call in (JanusPro(str(tmp_path)).build, JanusPro(str(tmp_path)).blueprint):
        with pytest.raises(ValueError, match="original layout") as error:
            call()
        assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl"}))
    with pytest.raises(ValueError, match="model_type 'qwen2_5_vl'; allowed: janus"):
        JanusPro(str(tmp_path)).build()


def test_missing_weights_are_named(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(checkpoints / SMALL, tmp_path / "damaged"))
    state = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in state.items() if "generation_head" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 4 weights .*generation_head"):
        JanusPro(str(folder), reading=FLOAT).build()


def test_a_tokenizer_that_loses_spaces_is_refused(checkpoints):
    from tokenizers import pre_tokenizers

    tokenizer = AutoProcessor.from_pretrained(checkpoints / SMALL).tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # what transformers' LlamaTokenizer puts there
    with pytest.raises(ValueError, match="tokenizer_class"):
        check_spaces(tokenizer)


# ------------------------------------------------------------------------------------------------------------ training


@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_trains(checkpoints, monkeypatch, tmp_path, finetune):
    """The shipped configuration, rehearsed; the VQ model is byte-identical afterwards and in the export."""
    monkeypatch.setenv("UAE_CHECKPOINTS", str(checkpoints))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])
    rehearsal = yaml.safe_load((CONFIGS / "debug/rehearsal.yaml").read_text())
    rehearsal["trainer"].update(max_steps=1, val_check_interval=1)
    rehearsal["data"]["init_args"].update(val_size=2, test_size=2)
    del rehearsal["model"]["init_args"]["system"]["init_args"]["rendering"]  # of diffusion
    (tmp_path / "rehearsal.yaml").write_text(yaml.safe_dump(rehearsal))
    files = [CONFIGS / "janus_pro.yaml", CONFIGS / f"finetune/{finetune}_pretrained.yaml", tmp_path / "rehearsal.yaml"]
    words = [word for file in files for word in ("--config", str(file))]
    run = cli.main(["fit", *words, "--model.init_args.optimizer.init_args.lr=0.01"])
    assert run.trainer.global_step == 1
    summary = json.loads((tmp_path / "outputs/janus_pro/summary.json").read_text())
    assert 0 < summary["after"]["unified_score/held_out"] <= 1
    start, trained = JanusPro(reading=FLOAT).build(), run.model.umm
    assert trained.captioner.learner.network is trained.renderer.learner.network
    before, now = (one.captioner.learner.network.base.model.vqmodel.state_dict() for one in (start, trained))
    assert all(torch.equal(value, now[name]) for name, value in before.items())
    moved = [name for name, p in trained.captioner.learner.network.named_parameters() if p.requires_grad]
    assert ("lora" in moved[0]) == (finetune == "lora")
    if finetune == "full":
        path = tmp_path / "outputs/janus_pro/export"
        model, report = JanusForConditionalGeneration.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
        assert not report["missing_keys"]
        exported = model.model.vqmodel.state_dict()
        assert all(torch.equal(value, exported[name]) for name, value in before.items())
