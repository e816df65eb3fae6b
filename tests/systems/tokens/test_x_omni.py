"""X-Omni from a checkpoint in the official layout: assembled, trained through the command line, exported, read again."""

import json
from pathlib import Path

import pytest
import torch

from tests.systems.tokens.fits import enter, fit
from uae.models.captioners.loading import Reading
from uae.models.tokens.x_omni_decoder import Decoding
from uae.rehearsal.catalog import write
from uae.systems.x_omni import XOmni
from uae.types import Sampling
from uae.weights.placement import Placement

NAMES = ["X-Omni/X-Omni-En", "black-forest-labs/FLUX.1-dev", "openai/clip-vit-large-patch14"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, only=NAMES)
    return folder


@pytest.fixture
def mirror(folder, monkeypatch, tmp_path):
    return enter(folder, monkeypatch, tmp_path, height=48, width=32)


def small(**settings):
    return XOmni(**{"height": 48, "width": 32, "reading": Reading(dtype="float32"), **settings})


def frozen_bytes(umm):
    states = [part.state_dict() for part in umm.renderer.modules()]
    return [{name: value.view(torch.uint8).numpy().tobytes() for name, value in state.items()} for state in states]


def test_one_network_fills_all_roles(mirror):
    umm = small().build()
    assert umm.captioner.learner.network is umm.renderer.learner.network
    assert len(umm.renderer.modules()) == 6  # image tokenizer; transformer, map of features, VAE, CLIP, T5
    assert umm.captioner.instruction.startswith("Describe this image")
    rollout = umm.captioner.sample(umm.captioner.prepare(torch.rand(2, 3, 24, 24)), 2, Sampling(max_tokens=6), range(4))
    images = umm.renderer.render(umm.conditioner.encode(rollout.texts, rollout), range(4))
    assert images.shape == (4, 3, 48, 32)
    assert images.dtype == torch.float32
    assert 0 <= images.min() < images.max() <= 1


@pytest.mark.parametrize(("finetune", "train"), [("lora", "both"), ("full", "captions"), ("full", "images")])
def test_three_steps_and_back(mirror, tmp_path, finetune, train):
    """Trained, exported, and read again by the configuration's own path."""
    extra = ["--model.init_args.optimizer.init_args.lr=0.003", f"--model.init_args.train={train}"]
    run = fit("x_omni", f"finetune/{finetune}_pretrained.yaml", extra=extra)
    assert run.trainer.global_step == 3
    assert json.loads((tmp_path / "outputs/x_omni/summary.json").read_text())["steps"] == 3
    start = small().build()
    assert frozen_bytes(run.model.umm) == frozen_bytes(start)
    trained, base = (umm.captioner.learner.network.base for umm in (run.model.umm, start))
    export = Path(run.trainer.log_dir, "export")
    if finetune == "lora":
        from peft import PeftModel

        again = PeftModel.from_pretrained(base, export).get_base_model()
        weights = {name: value for name, value in again.named_parameters() if "lora_" in name}
        assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
        expected = dict(trained.named_parameters())
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
        return
    written = json.loads((export / "config.json").read_text())
    official = json.loads((mirror / NAMES[0] / "config.json").read_text())
    assert {name: written[name] for name in ("model_type", "mm_vocab_size", "vision_config", "mm_special_tokens")} == {
        name: official[name] for name in ("model_type", "mm_vocab_size", "vision_config", "mm_special_tokens")
    }
    again = small(checkpoint=str(export), vision=NAMES[0]).build().captioner.learner.network.base
    expected = trained.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    moved = {name for name, value in base.state_dict().items() if not torch.equal(value, expected[name])}
    assert {"model.mm_embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"} <= moved
    heads = {"captions": {"lm_head.weight", "model.lm_norm.weight"}, "images": {"mm_head.weight", "model.mm_norm.weight"}}
    assert {name for part in heads.values() for name in part} & moved == heads[train]


def test_weights_have_the_names_of_the_checkpoint(mirror):
    from safetensors import safe_open

    with safe_open(mirror / NAMES[0] / "model.safetensors", "pt") as file:
        assert set(file.keys()) == small().build().captioner.learner.network.base.state_dict().keys()


# ---------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "X-Omni/X-Omni-Zh"}, r"pixel decoder that is not known.*X-Omni/X-Omni-En; change .*checkpoint"),
        ({"checkpoint": "openai/clip-vit-large-patch14"}, r"model_type 'clip.*'; allowed: x-omni"),
        ({"vision": "openai/clip-vit-large-patch14"}, r"lacks decoder, dtype, encoder, transform; set .*\.vision"),
        ({"template": "draw"}, r"has no \{caption\}"),
        ({"width": 40}, r"width=40; allowed: multiples of 16"),
        ({"reading": Reading(dtype="float32", max_pixels=4096)}, r"reading\.max_pixels=4096, but X-Omni .* allowed: null"),
        ({"reading": Reading(trust_remote_code="X-Omni/X-Omni-En")}, r"reading\.trust_remote_code='X-Omni.*allowed: null"),
        ({"decoding": Decoding(placement=Placement("float8"))}, r"placement\.dtype='float8'; allowed: bfloat16"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(mirror, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        small(**settings).build()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"guidance": 1.0}, "guidance=1.0; allowed: above 1"), ({"steps": 0}, "steps=0; allowed: 1 or more")],
)
def test_settings_of_the_decoder_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_a_plan_needs_no_weights(mirror, monkeypatch):
    monkeypatch.delenv("UAE_CHECKPOINTS")
    blueprint = XOmni(height=1152, width=1152).blueprint()
    assert blueprint.prompt_tokens == 72 * 72 + 128
    assert blueprint.drawing.tokens == 5184
    assert all(weight.is_meta for part, _ in blueprint.frozen.values() for weight in part.parameters())
