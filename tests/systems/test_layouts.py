import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from tests.systems import layout_cases as cases
from uae.systems.layouts import (
    openuni_parts,
    uae_language_model,
    uae_transformer,
    uniworld_language_model,
    uniworld_parts,
    uniworld_transformer,
)


def close(found, expected, atol=1e-6):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def official_names():
    """Who writes ``llm_lora``: transformers before or since 4.52 around the inner model, or PEFT around all of it."""
    return {
        "inner": lambda name: name,
        "inner, old": lambda name: cases.old_wrapped_name(name).replace("model.base_model.model.visual.", "visual."),
        "whole": lambda name: (
            name.replace("model.base_model.model.", "base_model.model.model.") if "base_model" in name else f"base_model.model.{name}"
        ),
        "whole, old": lambda name: "base_model.model." + cases.old_name(name.replace("base_model.model.", "")),
    }


@pytest.fixture(scope="module")
def trained():
    """UAE's start, and what its official training made of it: other weights with an adapter on top."""
    start, model = cases.language_model(), cases.adapted(cases.language_model(seed=5))
    return start, model, cases.logits(model)


@pytest.mark.parametrize("kind", official_names())
def test_uae_language_model_merges_its_adapter(tmp_path, trained, kind):
    start, model, expected = trained
    rename = official_names()[kind]
    state = {rename(name): value for name, value in model.state_dict().items()}
    if "old" in kind:
        del state[rename("lm_head.weight")]  # tied weights were left out
    cases.write_uae(tmp_path, start, state)
    loaded, projector = uae_language_model(tmp_path, alpha=2 * cases.RANK)
    close(cases.logits(loaded), expected, 4e-6)  # the merged product is rounded; by how much depends on the processor
    assert (expected - cases.logits(start)).abs().max() > 0.1
    close(projector, cases.projector(), 0)
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    assert loaded.generation_config.temperature == 0.1
    assert loaded.name_or_path == str(tmp_path)  # no folder that an adapter on top of this could be loaded with


def test_uae_merges_in_the_dtype_asked_for(tmp_path, trained):
    """Half the checkpoint's weights' precision must not be lost again when the model is float32."""
    state = {name: value.bfloat16() for name, value in trained[1].state_dict().items()}
    cases.write_uae(tmp_path, cases.language_model().to(torch.bfloat16), state)
    name = "model.language_model.layers.0.self_attn.q_proj"
    wrapped = name.replace("model.", "model.base_model.model.", 1)
    A, B, weight = (state[f"{wrapped}.{part}.weight"].double() for part in ("lora_A.default", "lora_B.default", "base_layer"))
    expected = weight + B @ A * 64 / cases.RANK
    found = uae_language_model(tmp_path, torch.float32)[0].get_parameter(f"{name}.weight").detach()
    close(found, expected.float(), 1e-5)
    half = uae_language_model(tmp_path)[0].get_parameter(f"{name}.weight").detach()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, atol=1e-5, rtol=2**-8)


def test_uae_scale_is_64_over_the_rank(tmp_path, trained):
    start, _, _ = trained
    model = cases.adapted(cases.language_model(seed=5), rank=2)
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 32.0
    cases.write_uae(tmp_path, start, model.state_dict())
    expected = cases.logits(model)
    close(cases.logits(uae_language_model(tmp_path)[0]), expected, 1e-5 * expected.abs().max().item())


def test_uae_without_training_is_what_transformers_loads(tmp_path, trained):
    start, _, _ = trained
    cases.write_uae(tmp_path, start, None)
    loaded, projector = uae_language_model(tmp_path)
    expected = AutoModelForImageTextToText.from_pretrained(tmp_path / "llm")  # which ignores the projector
    close(cases.logits(loaded), cases.logits(start))
    close(dict(loaded.named_buffers()), dict(expected.named_buffers()), 0)
    assert {**loaded.config.to_dict(), "_name_or_path": str(tmp_path / "llm")} == expected.config.to_dict()
    assert loaded.name_or_path == str(tmp_path / "llm")
    assert not any(value.any() for value in projector.values())
    half, _ = uae_language_model(tmp_path, torch.bfloat16)
    reference = AutoModelForImageTextToText.from_pretrained(tmp_path / "llm", dtype=torch.bfloat16)
    close(dict(half.state_dict()), dict(reference.state_dict()), 0)
    close(dict(half.named_buffers()), dict(reference.named_buffers()), 0)  # the rotary frequencies stay float32


def edit(folder, change):
    """Rewrite all shards of a folder."""
    for file in folder.glob("*.safetensors"):
        save_file(change(load_file(file)), file)


def without(part):
    return lambda state: {name: value for name, value in state.items() if part not in name}


def renamed(old, new):
    return lambda state: {name.replace(old, new): value for name, value in state.items()}


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        (
            "llm",
            without("layers.1.mlp"),
            r"missing 3 of model.language_model.layers.\*.mlp \(e.g. .*layers.1.mlp.down_proj",
        ),
        ("llm", renamed("layers.1.", "layers.7."), r"missing 2 of .*layers.1.*unexpected 2 of .*layers.7"),
        ("llm_lora", without("lora_B"), r"one factor of two in 2\d layers \(e.g. "),
        (
            "llm_lora",
            renamed("layers.1.self_attn.q_proj.lora", "layers.9.self_attn.q_proj.lora"),
            "layers.9.*is not there",
        ),
        ("llm_lora", renamed("base_layer.weight", "plain"), "unexpected .*plain"),
        ("llm_lora", renamed(".lora_A.", ".lora_magnitude_vector."), "more than two factors a layer"),
    ],
)
def test_a_wrong_uae_checkpoint_is_refused(tmp_path, trained, folder, change, message):
    start, model, _ = trained
    cases.write_uae(tmp_path, start, model.state_dict() if folder == "llm_lora" else None)
    edit(tmp_path / folder, change)
    with pytest.raises(ValueError, match=message) as refusal:
        uae_language_model(tmp_path)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uae_transformer_is_its_peft_model(tmp_path, dtype):
    transformer = cases.sd3_transformer()
    transformer.save_pretrained(tmp_path / "dit", max_shard_size="30KB")
    assert len(list((tmp_path / "dit").glob("*.safetensors"))) > 1
    close(cases.sd3_output(uae_transformer(tmp_path, torch.float32)), cases.sd3_output(cases.sd3_transformer()), 0)
    config = peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    wrapped = peft.get_peft_model(transformer, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    wrapped.save_pretrained(tmp_path / "dit_lora")
    loaded = uae_transformer(tmp_path, dtype)
    assert type(loaded).__name__ == "SD3Transformer2DModel"
    assert {value.dtype for value in loaded.state_dict().values()} == {dtype}
    assert not any("lora" in name for name in loaded.state_dict())
    expected = cases.sd3_output(wrapped)
    assert (expected - cases.sd3_output(cases.sd3_transformer())).abs().max() > 0.01
    close(cases.sd3_output(loaded.float()), expected, 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(
    ("folder", "change", "message"),
    [
        ("dit", without("transformer_blocks.1.attn"), r"missing \d+ of transformer_blocks.\*.attn"),
        ("dit_lora", without("blocks.1.attn.to_q.lora_B"), "dit_lora.* lacks .*blocks.1.attn.to_q.lora_B"),
        ("dit_lora", renamed("blocks.1.attn", "blocks.8.attn"), r"dit_lora.* lacks .*\(and \d+ more\)"),
    ],
)
def test_a_wrong_uae_transformer_is_refused(tmp_path, folder, change, message):
    cases.sd3_transformer().save_pretrained(tmp_path / "dit")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k"])
    peft.get_peft_model(cases.sd3_transformer(), config).save_pretrained(tmp_path / "dit_lora")
    edit(tmp_path / folder, change)
    with pytest.raises(ValueError, match=message):
        uae_transformer(tmp_path, torch.float32)


def test_uniworld_is_taken_apart(tmp_path):
    model, transformer = cases.language_model(tied=False), cases.flux_transformer()
    cases.write_uniworld(tmp_path, model, transformer)
    loaded, projectors = uniworld_language_model(tmp_path)
    close(cases.logits(loaded), cases.logits(model))
    assert projectors.keys() == {"denoise_projector", "siglip_projector", "vae_projector"}
    for i, name in enumerate(projectors):
        close(projectors[name], {key: value + i for key, value in cases.projector().items()}, 0)
    close(cases.flux_output(uniworld_transformer(tmp_path, torch.float32)), cases.flux_output(transformer), 0)
    loaded.save_pretrained(tmp_path / "again")
    close(cases.logits(AutoModelForImageTextToText.from_pretrained(tmp_path / "again")), cases.logits(model))


def test_uniworld_finds_its_transformer_configuration_in_flux(tmp_path):
    transformer = cases.flux_transformer()
    cases.write_uniworld(tmp_path, cases.language_model(tied=False), transformer, "somewhere/config.json")
    with pytest.raises(ValueError, match="denoiser_config; set model.init_args.system.init_args.flux"):
        uniworld_transformer(tmp_path, torch.float32)
    transformer.save_pretrained(tmp_path / "flux/transformer")
    loaded = uniworld_transformer(tmp_path, torch.bfloat16, flux=tmp_path / "flux")
    assert torch.equal(loaded.proj_out.weight, transformer.proj_out.weight.bfloat16())


def test_a_wrong_uniworld_checkpoint_is_refused(tmp_path):
    cases.write_uniworld(tmp_path, cases.language_model(tied=False), cases.flux_transformer())
    shutil.copytree(tmp_path, tmp_path.parent / "plain")
    edit(tmp_path, renamed("denoise_tower.denoiser.proj_out", "denoise_tower.denoiser.final"))
    with pytest.raises(ValueError, match=r"denoise_tower.denoiser does not fit FluxTra.*missing 2 of proj_out.*unexpected 2 of final"):
        uniworld_transformer(tmp_path, torch.float32)
    edit(tmp_path, without("lm_head"))
    with pytest.raises(ValueError, match="missing 1 of lm_head"):
        uniworld_language_model(tmp_path)
    edit(tmp_path.parent / "plain", without("denoise_projector"))
    with pytest.raises(ValueError, match="no UniWorld-V1"):
        uniworld_language_model(tmp_path.parent / "plain")


def test_uniworld_parts_copy_nothing():
    state = {name: torch.zeros(1) for name in ("visual.a", "lm_head.weight", "denoise_tower.denoiser.b.c", "denoise_tower.x.0.bias")}
    parts = uniworld_parts(state)
    assert parts.language_model == {name: state[name] for name in ("visual.a", "lm_head.weight")}
    assert parts.projectors["x"]["0.bias"] is state["denoise_tower.x.0.bias"]
    assert parts.transformer["b.c"] is state["denoise_tower.denoiser.b.c"]


def openuni_state():
    shapes = {
        "meta_queries": (4, 8),
        "connector.layers.0.layer_norm1.weight": (8,),
        "projector.weight": (6, 8),
        "projector.bias": (6,),
    }
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def test_openuni_is_taken_apart():
    state = openuni_state()
    parts = openuni_parts(state)
    assert parts.meta_queries is state["meta_queries"]
    assert parts.connector == {"layers.0.layer_norm1.weight": state["connector.layers.0.layer_norm1.weight"]}
    assert parts.projector == {"weight": state["projector.weight"], "bias": state["projector.bias"]}
    assert parts.transformer == parts.language_model == {}
    assert parts.found == "connector (1), meta_queries (1), projector (2)"
    more = openuni_parts(state | {"transformer.proj_out.weight": torch.ones(2, 3), "lmm.vision_model.x": torch.ones(1)})
    assert more.transformer.keys() == {"proj_out.weight"}
    assert more.language_model.keys() == {"vision_model.x"}


def test_openuni_adapters_are_merged():
    transformer = cases.sd3_transformer()
    transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    expected = cases.sd3_output(transformer)
    parts = openuni_parts(openuni_state() | {f"transformer.{k}": v for k, v in transformer.state_dict().items()})
    plain = cases.sd3_transformer(seed=9)
    plain.load_state_dict(parts.transformer)
    close(cases.sd3_output(plain), expected, 1e-5)


@pytest.mark.parametrize(
    ("lost", "extra", "message"),
    [
        ("meta_queries", {}, r"missing meta_queries; found connector \(1\), projector \(2\)"),
        ("projector", {}, "missing projector"),
        ("nothing", {"optimizer.step": torch.zeros(1)}, "unknown optimizer"),
    ],
)
def test_what_is_no_openuni_checkpoint_is_refused(lost, extra, message):
    with pytest.raises(ValueError, match=message):
        openuni_parts({k: v for k, v in openuni_state().items() if not k.startswith(lost)} | extra)
