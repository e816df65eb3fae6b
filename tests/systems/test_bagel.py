"""BAGEL from a checkpoint in the official layout: assembled, trained through the command line, exported, read again."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from tests.systems.test_fit import CONFIGS
from uae import cli
from uae.models.bagel.renderer import BagelRendering
from uae.models.captioners.loading import Reading
from uae.rehearsal.catalog import write
from uae.systems.bagel import Bagel
from uae.weights.placement import Placement

NAME, CLIP_NAME = "ByteDance-Seed/BAGEL-7B-MoT", "openai/clip-vit-large-patch14"
SMALL = BagelRendering(32, 32, steps=2, rows=2, placement=Placement("float32"))
DELTA = yaml.safe_load((CONFIGS / "debug/rehearsal.yaml").read_text())
CLIP = {"class_path": "uae.encoders.HFEncoder", "init_args": {"path": CLIP_NAME}}
DELTA["model"]["init_args"]["unified_score"] = {
    "class_path": "uae.metrics.UnifiedScore", "init_args": {"encoders": {"clip": CLIP}, "held_out": ["clip"]}
}  # fmt: skip
DELTA["model"]["init_args"]["sampling"]["max_tokens"] = 6
DELTA["model"]["init_args"]["system"]["init_args"]["reading"]["max_pixels"] = 21168  # 16 patches of an image instead of 729
BOTH = {
    "train": "both",
    "exploration": {"class_path": "uae.models.flow.policy.Exploration", "init_args": {"noise": "flow"}},
    "image_loss": {"class_path": "uae.grpo.GRPOLoss", "init_args": {"epsilon_low": 1e-4, "epsilon_high": 1e-4, "beta": 0.01}},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    write(made := tmp_path_factory.mktemp("checkpoints"), only=[NAME, CLIP_NAME])
    return made


@pytest.fixture
def mirror(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.setenv("UAE_CHECKPOINTS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


def fit(*deltas, train="captions"):
    settings = json.loads(json.dumps(DELTA))
    settings["model"]["init_args"] |= BOTH if train == "both" else {}
    Path("delta.yaml").write_text(yaml.safe_dump(settings))
    files = (CONFIGS / "bagel.yaml", *(CONFIGS / delta for delta in deltas), "delta.yaml")
    words = [word for file in files for word in ("--config", str(file))]
    return cli.main(["fit", *words, "--model.init_args.optimizer.init_args.lr=0.01"])


def small(name=NAME):
    return Bagel(name, reading=Reading(dtype="float32"), rendering=SMALL)


def weights(umm):
    """Every tensor of the network below an adapter, by its official name; and those of the autoencoder."""
    state = umm.captioner.learner.network.base.state_dict()
    named = {key.replace(".base_layer.", "."): value for key, value in state.items() if "lora_" not in key}
    (autoencoder,) = umm.renderer.modules()
    return named, autoencoder.state_dict()


@pytest.mark.parametrize(("finetune", "train"), [("lora", "captions"), ("full", "captions"), ("lora", "both"), ("full", "both")])
def test_three_steps(mirror, finetune, train):
    """What does not train keeps its bytes; the export is in the official layout, or an adapter for it."""
    run = fit(f"finetune/{finetune}_pretrained.yaml", train=train)
    assert run.trainer.global_step == 3
    trained, start = run.model.umm, small().build()
    assert trained.captioner.learner is trained.renderer.learner
    (now, drawing), (before, drawing_before) = weights(trained), weights(start)
    assert all(torch.equal(value, drawing[name]) for name, value in drawing_before.items())
    moved = {name for name, value in before.items() if not torch.equal(value, now[name])}
    network, export = trained.captioner.learner.network, Path("outputs/bagel/export")
    if finetune == "lora":
        assert not moved
        pushed = {name for name, weight in network.named_parameters() if "lora_B" in name and weight.abs().max() > 0}
        assert any("_moe_gen" in name for name in pushed) == (train == "both")
        assert any("_moe_gen" not in name for name in pushed)
        assert json.loads((export / "adapter_config.json").read_text())["base_model_name_or_path"].endswith(NAME)
        return
    assert any("_moe_gen" in name for name in moved) == (train == "both")
    assert {"language_model.lm_head.weight", "connector.fc1.weight"} <= moved
    assert not [name for name in moved if "vision_model" in name or "pos_embed" in name]
    names = {file.name for file in export.iterdir()}
    assert {"ema.safetensors", "ae.safetensors", "llm_config.json", "vit_config.json", "tokenizer.json"} <= names
    official = load_file(mirror / NAME / "ema.safetensors")
    unused = {name for name in official if "encoder.layers.2." in name}
    assert set(load_file(export / "ema.safetensors")) == set(official) - unused
    again = small(str(export.resolve())).build()
    assert all(torch.equal(value, weights(again)[0][name]) for name, value in now.items())
    texts = ["a red square"]
    pictures = [umm.renderer.render(umm.conditioner.encode(texts), [3]) for umm in (trained, again, start)]
    assert torch.equal(pictures[0], pictures[1])
    assert not torch.equal(pictures[0], pictures[2])


def test_published_sizes(monkeypatch):
    """Bytes of the released weight file in bfloat16, and the parts that the authors count."""
    monkeypatch.delenv("UAE_CHECKPOINTS", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    blueprint = Bagel().blueprint()
    size = sum(weight.numel() for weight in blueprint.policy.state_dict().values())
    assert size * 2 == pytest.approx(29.21e9, rel=0.01)
    layers = [weight.numel() for name, weight in blueprint.policy.named_parameters() if ".layers." in name and "language" in name]
    assert sum(layers) == pytest.approx(28 * 2 * 233.06e6, rel=0.001)
    vae, _ = blueprint.frozen["vae"]
    assert sum(weight.numel() for weight in vae.parameters()) == pytest.approx(83.8e6, rel=0.01)
    assert blueprint.drawing.written == 32 * 32 + 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"reading": Reading(compile=True)}, "reading.compile=True.*allowed: false; change .*init_args.reading.compile"),
        ({"reading": Reading(image_first=False)}, "reading.image_first=False.*allowed: null or true"),
        ({"rendering": BagelRendering(height=40)}, "rendering.height=40; allowed: multiples of 16 up to 1024"),
        ({"rendering": BagelRendering(width=2048)}, "rendering.width=2048; allowed: multiples of 16 up to 1024"),
    ],
)
def test_settings_that_cannot_be_followed(mirror, settings, message):
    with pytest.raises(ValueError, match=message):
        Bagel(**{"reading": Reading(dtype="float32"), **settings}).build()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"guidance": 0.5}, "rendering.guidance=0.5; allowed: 1"),
        ({"renorm": "local"}, "rendering.renorm='local'; allowed: global, channel, text_channel"),
        ({"renorm_min": 2.0}, "rendering.renorm_min=2.0; allowed: 0 to 1"),
        ({"guidance_times": (0.5, 0.5)}, r"rendering.guidance_times=\[0.5, 0.5\]; allowed: two numbers from 0 to 1"),
        ({"steps": 0}, "rendering.steps=0; allowed: 1 or more"),
        ({"shift": 0.0}, "rendering.shift=0.0; allowed: above 0"),
    ],
)
def test_drawings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        BagelRendering(**settings)


def test_a_damaged_checkpoint_is_named(folder, tmp_path):
    damaged = Path(shutil.copytree(folder / NAME, tmp_path / "damaged"))
    state = load_file(damaged / "ema.safetensors")
    save_file({name: value for name, value in state.items() if "q_proj_moe_gen" not in name}, damaged / "ema.safetensors")
    with pytest.raises(ValueError, match=r"missing 4 of language_model.*q_proj_moe_gen"):
        small(str(damaged)).build()
    (damaged / "llm_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no llm_config.json .* change model.init_args.system.init_args.checkpoint"):
        small(str(damaged)).build()
