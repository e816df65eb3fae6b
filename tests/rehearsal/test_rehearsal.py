"""The stand-ins: every one loads by the plain call its library documents, and writing is all or nothing."""

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms.functional import to_pil_image
from transformers import AutoModelForImageTextToText, AutoProcessor

from uae.encoders import HFEncoder
from uae.rehearsal import catalog
from uae.rehearsal.__main__ import main
from uae.rehearsal.catalog import PIPELINE_NAMES, write
from uae.rehearsal.encoders import ENCODERS
from uae.rehearsal.language_models import LANGUAGE_MODELS

RENDERING = yaml.safe_load((Path(__file__).parents[2] / "configs/debug/rehearsal.yaml").read_text())
RENDERING = RENDERING["model"]["init_args"]["system"]["init_args"]["rendering"]
CLASSES = {
    "Qwen/Qwen2.5-VL-3B-Instruct": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "Qwen/Qwen2.5-VL-7B-Instruct": ("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLProcessor"),
    "Qwen/Qwen3-VL-4B-Instruct": ("Qwen3VLForConditionalGeneration", "Qwen3VLProcessor"),
    "OpenGVLab/InternVL3-1B-hf": ("InternVLForConditionalGeneration", "InternVLProcessor"),
    "OpenGVLab/InternVL3-2B-hf": ("InternVLForConditionalGeneration", "InternVLProcessor"),
    "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": ("LlavaOnevisionForConditionalGeneration", "LlavaOnevisionProcessor"),
}
SYSTEM = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
TURN = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe."}]}]
TEXTS = [
    'A sign reads "OPEN 24/7" -- isn\'t it? (Yes; it\'s red.)', "  two\n\nlines\t and <b>tags</b>", "naïve café, 日本 🎈",
]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder)
    return folder


def state_below(state, prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def files_of(folder):
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in folder.rglob("*") if file.is_file()}


def gray(level):
    return to_pil_image(torch.full((3, 40, 60), level))


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_language_models_caption(checkpoints, name):
    path = checkpoints / name
    model, report = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(path)
    assert (type(model).__name__, type(processor).__name__) == CLASSES[name]
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for text in TEXTS:
        assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text
    prompt = processor.apply_chat_template(TURN, add_generation_prompt=True, tokenize=False)
    inputs = [processor(images=[gray(level)], text=[prompt], return_tensors="pt") for level in (0.1, 0.9)]
    with torch.no_grad():
        dark, light = (model(**given).logits[0, -1].log_softmax(-1) for given in inputs)
        assert (dark.exp() * (dark - light)).sum() > 0.05  # the picture matters
        plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        torch.manual_seed(0)
        out = model.generate(
            **inputs[0], **plain, max_new_tokens=12, num_return_sequences=48, output_logits=True, return_dict_in_generate=True
        )
    tokens_NT = out.sequences[:, inputs[0]["input_ids"].shape[1] :]
    logp_NTV = torch.stack(out.logits, 1).log_softmax(-1)
    entropy = -(logp_NTV.exp() * logp_NTV).sum(-1).mean()
    assert 2.0 < entropy < 5.7  # uniform is 6.1
    ended_N = torch.isin(tokens_NT, torch.tensor(model.generation_config.eos_token_id)).any(1)
    assert 4 <= ended_N.sum() <= 44
    captions = processor.tokenizer.batch_decode(tokens_NT, skip_special_tokens=True)
    assert sum("\N{REPLACEMENT CHARACTER}" in caption for caption in captions) <= 6  # captions look like text


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_shipped_generation_settings_would_reshape_the_policy(checkpoints, name):
    settings = json.loads((checkpoints / name / "generation_config.json").read_text())
    assert settings["repetition_penalty"] == 1.05
    assert settings["top_k"] == 1
    assert settings["temperature"] == 0.1
    assert len(settings["eos_token_id"]) == 2


def test_chat_template_of_qwen(checkpoints):
    def spelled(name, messages, **settings):
        processor = AutoProcessor.from_pretrained(checkpoints / name)
        return processor.apply_chat_template(messages, tokenize=False, **settings)

    old, new = "Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-4B-Instruct"
    turn = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe.<|im_end|>\n"
    answer = "<|im_start|>assistant\n"
    assert spelled(old, TURN, add_generation_prompt=True) == SYSTEM + turn + answer
    assert spelled(new, TURN, add_generation_prompt=True) == turn + answer
    caption = "<|im_start|>generate\na cat<|im_end|>\n"
    for content in ("a cat", [{"type": "text", "text": "a cat"}]):
        assert spelled(old, [{"role": "generate", "content": content}]) == SYSTEM + caption
    own = [{"role": "system", "content": "Be brief."}, *TURN]
    assert spelled(old, own) == "<|im_start|>system\nBe brief.<|im_end|>\n" + turn


@pytest.mark.parametrize("name", PIPELINE_NAMES)
def test_pipelines_draw_at_the_size_of_the_rehearsal(checkpoints, name):
    pipe = DiffusionPipeline.from_pretrained(checkpoints / name)
    pipe.set_progress_bar_config(disable=True)
    size = {"height": RENDERING["height"], "width": RENDERING["width"], "num_inference_steps": RENDERING["steps"]}
    binned = {"use_resolution_binning": False} if "Sana" in name else {}
    image = pipe("a red circle", output_type="pt", **size, **binned).images[0]
    assert image.shape == (3, 32, 32)
    assert image.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(ENCODERS) - {"google/siglip2-so400m-patch16-512"}))
def test_encoders_tell_images_apart(checkpoints, name):
    feature = "cls" if "dino" in name else "projection"
    first, second = HFEncoder(str(checkpoints / name), feature).load().embed(torch.rand(2, 3, 40, 40))
    assert nn.functional.cosine_similarity(first, second, dim=0) < 0.9999


def test_clip_reads_text(checkpoints):
    for name, length in (("openai/clip-vit-large-patch14", 77), ("zer0int/LongCLIP-L-Diffusers", 248)):
        processor = AutoProcessor.from_pretrained(checkpoints / name)
        ids = processor(text=["a cat " * 100], return_tensors="pt", truncation=True).input_ids
        assert ids.shape == (1, length)


def test_uae_loads_like_the_official_demo(checkpoints):
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig, PeftModel, get_peft_model

    folder = checkpoints / "UAE"
    decoder = SD3Transformer2DModel.from_pretrained(folder / "dit")
    pipe = DiffusionPipeline.from_pretrained(folder / "SD3_model")
    assert decoder.config.joint_attention_dim == pipe.transformer.config.joint_attention_dim
    pooled = pipe.text_encoder.config.projection_dim + pipe.text_encoder_2.config.projection_dim
    noise = torch.rand(1, 4, 8, 8), torch.rand(1, 5, decoder.config.joint_attention_dim), torch.rand(1, pooled)
    with torch.no_grad():
        drawn = [part(*noise, torch.ones(1)).sample for part in (pipe.transformer, decoder)]
        drawn.append(PeftModel.from_pretrained(decoder, folder / "dit_lora")(*noise, torch.ones(1)).sample)
    assert not drawn[0].allclose(drawn[1], atol=1e-3)
    assert not drawn[1].allclose(drawn[2], atol=1e-3)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = AutoModelForImageTextToText.from_pretrained(folder / "llm", dtype=torch.float32, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {f"projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}
    shards = [load_file(folder / "llm_lora" / f"model-{i:05}-of-00003.safetensors") for i in (1, 2, 3)]
    tuned = {name: tensor for shard in shards for name, tensor in shard.items()}
    assert len(tuned) == sum(len(shard) for shard in shards)
    out, width = tuned["projector.2.weight"].shape[0], tuned["projector.0.weight"].shape[1]
    assert out == decoder.config.joint_attention_dim
    assert width == model.config.get_text_config().hidden_size
    words = AutoProcessor.from_pretrained(folder / "llm_model_preprocessor").tokenizer("a cat", return_tensors="pt")
    with torch.no_grad():
        base = model(**words).logits
        settings = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
        model.model = get_peft_model(model.model, settings)
        model.projector = nn.Sequential(nn.Linear(width, 2 * out), nn.GELU(), nn.Linear(2 * out, out))
        model.load_state_dict(tuned)  # strict: the official names, all of them
        assert not model(**words).logits.allclose(base, atol=1e-2)
        with model.model.disable_adapter():
            torch.testing.assert_close(model(**words).logits, base)


def test_uniworld_is_a_qwen_a_flux_and_projectors(checkpoints, tmp_path):
    from diffusers import FluxTransformer2DModel

    folder = checkpoints / "LanguageBind/UniWorld-V1"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    state = {name: tensor for file in sorted(set(index.values())) for name, tensor in load_file(folder / file).items()}
    assert set(state) == set(index)
    assert {name.split(".")[0] for name in state} == {"visual", "model", "lm_head", "denoise_tower"}
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_config"]["model_type"] == "qwen2_5_vl"  # so Qwen2_5_VLConfig.from_pretrained takes it for the whole
    tower = config.pop("denoise_tower")
    denoiser = FluxTransformer2DModel.from_config(tower["denoiser_config"]).to(torch.bfloat16)
    denoiser.load_state_dict(state_below(state, "denoise_tower.denoiser."))
    flux = DiffusionPipeline.from_pretrained(checkpoints / "black-forest-labs/FLUX.1-dev")
    same = {**flux.transformer.config, "_name_or_path": None} == {**denoiser.config, "_name_or_path": None}
    assert same, "FLUX.1-dev's transformer is what the denoiser was trained from"
    siglip = json.loads((checkpoints / "google/siglip2-so400m-patch16-512/config.json").read_text())["vision_config"]
    widths = {"denoise": config["hidden_size"], "siglip": siglip["hidden_size"], "vae": denoiser.config.in_channels}
    for part, width in widths.items():
        projector = state_below(state, f"denoise_tower.{part}_projector.")
        assert projector["0.weight"].shape[1] == width
        assert projector["2.weight"].shape[0] == denoiser.config.joint_attention_dim == tower["output_hidden_size"]
    qwen = {name: tensor for name, tensor in state.items() if not name.startswith("denoise_tower.")}
    from safetensors.torch import save_file

    save_file(qwen, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "qwen2_5_vl"}))
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.get_text_config().rope_parameters["mrope_section"] == [4, 2, 2]
    assert AutoProcessor.from_pretrained(folder).tokenizer("a").input_ids
    head = torch.load(folder / "task_head_final.pt", weights_only=True)
    assert {name: tensor.shape[-1] for name, tensor in head.items() if "weight" in name}["0.weight"] == widths["denoise"]


def test_siglip_loads_as_uniworld_loads_it(checkpoints):
    from transformers import SiglipImageProcessor, SiglipVisionModel

    path = checkpoints / "google/siglip2-so400m-patch16-512"
    pixels = SiglipImageProcessor.from_pretrained(path)(images=[gray(0.3)], return_tensors="pt")
    assert SiglipVisionModel.from_pretrained(path)(**pixels).last_hidden_state.shape == (1, 4, 32)


@pytest.mark.parametrize(("release", "captioner", "pipeline"), [
    ("openuni_b_internvl3_1b_sana_0_6b_512_hf", "OpenGVLab/InternVL3-1B-hf", "Sana_600M_512px_diffusers"),
    ("openuni_l_internvl3_2b_sana_1_6b_512_hf", "OpenGVLab/InternVL3-2B-hf", "Sana_1600M_512px_diffusers"),
])  # fmt: skip
def test_openuni_fits_between_its_models(checkpoints, release, captioner, pipeline):
    width = json.loads((checkpoints / captioner / "config.json").read_text())["text_config"]["hidden_size"]
    sana = DiffusionPipeline.from_pretrained(checkpoints / "Efficient-Large-Model" / pipeline).transformer
    linear = [f"{x}.{kind}" for x in ("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2") for kind in ("weight", "bias")]
    linear += [f"self_attn.{x}_proj.{kind}" for x in ("q", "k", "v", "out") for kind in ("weight", "bias")]
    expected = {f"connector.layers.{i}.{name}" for i in range(6) for name in linear}
    expected |= {"meta_queries", "projector.weight", "projector.bias"}
    for stage in ("text2image23m", "blip3o60k"):
        state = torch.load(checkpoints / f"wusize/openuni/{release}_{stage}.pth", weights_only=True)
        decoder = state_below(state, "transformer.")
        assert set(state) - {f"transformer.{name}" for name in decoder} == expected
        assert state["meta_queries"].shape == (256, width)
        assert state["projector.weight"].shape == (sana.config.caption_channels, width)
        assert bool(decoder) == (stage == "blip3o60k")
    sana.load_state_dict(decoder)


def test_a_second_run_changes_nothing_and_says_what_to_run(checkpoints, capsys):
    before = files_of(checkpoints)
    main([str(checkpoints)])
    assert files_of(checkpoints) == before
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(catalog.catalog()) + 2
    command = "python -m uae.cli fit --config configs/uae.yaml --config configs/debug/rehearsal.yaml"
    assert lines[-1] == f"UAE_CHECKPOINTS={checkpoints} {command}"
    assert sum(len(content) for _, content in before.values()) < 60e6


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    name = "facebook/dinov2-large"
    write(tmp_path, [name])
    good = {file: content for file, (_, content) in files_of(tmp_path).items()}
    weights = tmp_path / name / "model.safetensors"
    for damage in (lambda: weights.unlink(), lambda: weights.write_bytes(good[weights][:99])):
        damage()
        assert not catalog.complete(tmp_path / name)
        write(tmp_path, [name])
        assert {file: content for file, (_, content) in files_of(tmp_path).items()} == good

    def dies(folder):
        (folder / "config.json").write_text("{")
        raise OSError("disk full")

    weights.unlink()
    with monkeypatch.context() as patched:
        patched.setitem(ENCODERS, name, dies)
        with pytest.raises(OSError, match="disk full"):
            write(tmp_path, [name])
    assert not (tmp_path / name).exists()
    write(tmp_path, [name])
    assert {file: content for file, (_, content) in files_of(tmp_path).items()} == good


def test_what_is_not_ours_stays(tmp_path):
    name = "facebook/dinov2-large"
    real = tmp_path / name / "model.safetensors"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"real")
    for copied_over_a_stand_in in (False, True):
        if copied_over_a_stand_in:
            real.unlink()
            write(tmp_path, [name])
            real.write_bytes(real.read_bytes() + b"real")
        content = real.read_bytes()
        with pytest.raises(SystemExit, match="model.safetensors was not written by this command"):
            main([str(tmp_path), "--only", name])
        assert real.read_bytes() == content
    with pytest.raises(SystemExit, match="--only bert: no such stand-in"):
        main([str(tmp_path), "--only", "bert"])


def test_a_folder_that_cannot_be_one_is_named_and_debugging_shows_the_traceback(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="error: .*Not a directory.*give another FOLDER"):
        main([str(tmp_path / "file")])
    monkeypatch.setenv("UAE_DEBUG", "1")
    with pytest.raises(NotADirectoryError):
        main([str(tmp_path / "file")])
