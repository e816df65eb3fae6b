"""The stages of training as fragments: who learns, who stays as it was, and which combinations are refused."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from uae import cli
from uae.miniature.tiny import Tiny

ROOT = Path(__file__).parents[2]
STAGES = ROOT / "configs/stages"
RATES = ["--model.init_args.optimizer.init_args.lr=0.02", "--model.init_args.image_lr=0.02"]
FAST = ["--model.init_args.group=2", "--model.init_args.reconstructions=2", "--trainer.max_steps=2"]


@pytest.fixture
def fit(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])

    def run(stage, *extra, base="configs/tiny.yaml", delta="configs/debug/fast.yaml"):
        files = [word for file in (base, STAGES / f"{stage}.yaml", delta) for word in ("--config", str(ROOT / file))]
        return cli.main(["fit", *files, *FAST, *RATES, *extra]).model

    return run


def weights(umm):
    """Base weights of the captioner, of the conditioner and of what draws."""
    transformer = getattr(umm.renderer, "renderer", umm.renderer).pipe.transformer
    networks = {
        "captioner": umm.captioner.learner.network, "conditioner": umm.conditioner, "transformer": transformer,
        "vae": getattr(umm.renderer, "renderer", umm.renderer).pipe.vae,
    }  # fmt: skip
    return {name: {plain(key): value for key, value in net.state_dict().items()} for name, net in networks.items()}


def plain(name):
    for wrapper in ("model.base_model.model.", "base_model.model.", ".base_layer"):
        name = name.replace(wrapper, "model." if wrapper.startswith("model.") else "")
    return name.removeprefix("model.")


def same(now, before):
    return all(torch.equal(value, now[key]) for key, value in before.items())


def learnt(policy):
    moved = [bool(weight.abs().max() > 0) for name, weight in policy.named_parameters() if "lora_B" in name]
    return sum(moved) > 0.8 * len(moved)  # the last block's text stream draws nothing


@pytest.mark.parametrize(
    ("stage", "captions", "images"),
    [
        ("generation_for_understanding", True, False),
        ("understanding_for_generation", False, True),
        ("joint", True, True),
    ],
)
def test_who_learns(fit, stage, captions, images):
    module = fit(stage)
    start, now = weights(Tiny().build()), weights(module.umm)
    assert all(same(now[name], start[name]) for name in start)  # adapters learn; everything below them stays
    assert learnt(module.umm.captioner.learner.network) == captions
    logged = module.trainer.logged_metrics
    assert ("image_policy/loss" in logged) == images
    assert ("policy/loss" in logged) == captions
    if images:
        assert learnt(module.image_policy)
        assert logged["image_policy/sampler_gap"] < 1e-3
        assert logged["image_policy/ratio_max"] != 1.0  # clipping can act: the second mini-batch saw an update


def test_centred_ratios_with_a_reference(fit):
    """Two passes over two mini-batches, so that the last step sees three updates since its rollout and since the reference."""
    options = {"ratio": "centred", "noise": "cps", "window": 2}
    module = fit(
        "understanding_for_generation", "--model.init_args.image_loss.init_args.beta=0.01", "--trainer.max_steps=4",
        "--model.init_args.num_iterations=2", *(f"--model.init_args.exploration.{key}={value}" for key, value in options.items()),
    )  # fmt: skip
    logged = module.trainer.logged_metrics
    assert learnt(module.image_policy)
    assert logged["image_policy/sampler_gap"] < 1e-5
    assert logged["image_policy/ratio_max"] != 1.0
    assert logged["image_policy/kl"] > 0


def test_full_finetuning_of_the_decoder_moves_it_and_nothing_else(fit, tmp_path):
    delta = tmp_path / "full.yaml"
    delta.write_text("model: {init_args: {image_finetune: {class_path: uae.models.finetune.Full}}}")
    module = fit("understanding_for_generation", "--config", str(delta))
    start, now = weights(Tiny().build()), weights(module.umm)
    moved = {name for name in start if not same(now[name], start[name])}
    assert moved == {"transformer"}
    exported = load_file(tmp_path / "outputs/tiny/export/renderer/diffusion_pytorch_model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in now["transformer"].items() if key in exported)
    assert (tmp_path / "outputs/tiny/export/renderer/config.json").is_file()


def test_a_trained_decoder_is_exported_as_an_adapter_of_its_base(fit, tmp_path):
    module = fit("joint")
    folder = tmp_path / "outputs/tiny/export/renderer"
    base = Tiny().build().renderer.pipe.transformer
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"].endswith("transformer")
    again, trained = PeftModel.from_pretrained(base, folder), module.image_policy.model
    g = torch.Generator().manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 16, 3, 3, generator=g), "encoder_hidden_states": torch.randn(2, 5, 128, generator=g),
        "pooled_projections": torch.randn(2, 128, generator=g), "timestep": torch.tensor([10.0, 700.0]),
    }  # fmt: skip
    inputs["hidden_states"] = inputs["hidden_states"][:, : base.config.in_channels]
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).sample, trained(**inputs).sample, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--model.init_args.image_finetune=null"], "model.init_args.image_finetune"),
        (["--model.init_args.exploration.window=9"], "exploration.window=9"),
    ],
)
def test_what_cannot_learn_is_refused(fit, capsys, extra, message):
    with pytest.raises(SystemExit):
        fit("understanding_for_generation", *extra)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_a_renderer_without_flow_matching_is_refused(fit, mirrored, capsys):
    pipeline = "--model.init_args.system.init_args.pipeline=stabilityai/stable-diffusion-xl-base-1.0"
    with pytest.raises(SystemExit):
        fit("understanding_for_generation", pipeline, base="configs/qwen_any.yaml", delta="configs/debug/rehearsal.yaml")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "StableDiffusionXLPipeline" in line


@pytest.mark.parametrize("name", ["uae", "metaquery"])
def test_stage_three_of_real_systems(fit, mirrored, name):
    module = fit(
        "understanding_for_generation", "--model.init_args.system.init_args.rendering.steps=3", "--model.init_args.group=2",
        base=f"configs/{name}.yaml", delta="configs/debug/rehearsal.yaml",
    )  # fmt: skip
    assert learnt(module.image_policy)
    assert not learnt(module.policy)


@pytest.fixture
def decoder(fit, tmp_path):
    """The adapter that a stage of images exported, and the images that its end saw."""
    fit("understanding_for_generation", "--run_name=decoder")
    return str(tmp_path / "outputs/decoder/export/renderer")


START = "--model.init_args.image_finetune.init_args.adapter"


def test_captions_are_drawn_with_the_adapter_of_an_earlier_stage_which_stays_as_it_is(fit, decoder, tmp_path):
    module = fit("generation_for_understanding", "--model.init_args.image_finetune=uae.models.finetune.LoRA", f"{START}={decoder}")
    network = module.umm.renderer.pipe.transformer
    adapter = load_file(Path(decoder, "adapter_model.safetensors"))
    held = {name.replace(".default", ""): weight for name, weight in network.model.state_dict().items() if "lora_" in name}
    assert all(torch.equal(held[name], weight) for name, weight in adapter.items())
    assert not any(weight.requires_grad for weight in network.parameters())
    assert module.image_policy is None  # neither optimizer nor checkpoint nor strategy knows it
    ended, begun = (json.loads((tmp_path / f"outputs/{run}/summary.json").read_text()) for run in ("decoder", "tiny"))
    assert begun["before"]["val_reward/mean"] == pytest.approx(ended["after"]["val_reward/mean"], abs=1e-6)
    again = tmp_path / "outputs/tiny/export/renderer/adapter_model.safetensors"
    assert again.read_bytes() == Path(decoder, "adapter_model.safetensors").read_bytes()


def test_a_start_for_a_network_that_there_is_not_is_refused(fit, capsys):
    words = ["--model.init_args.image_finetune=uae.models.finetune.LoRA", f"{START}=somewhere"]
    for stage in ("generation_for_understanding", "understanding_for_generation"):
        with pytest.raises(SystemExit):
            fit(stage, *words, base="configs/tiny_janus.yaml")
        line = capsys.readouterr().err.splitlines()[-1]
        assert line == f"error: {START[2:]}=somewhere, but the captioner's network draws, too; allowed: null"


def test_a_finetuning_without_a_start_changes_nothing_where_the_renderer_does_not_learn(fit):
    module = fit("generation_for_understanding", "--model.init_args.image_finetune=uae.models.finetune.LoRA")
    assert isinstance(module.umm.renderer.pipe.transformer, type(Tiny().build().renderer.pipe.transformer))
