"""Emu3 from a checkpoint in the released layout: assembled, trained through the command line, exported, read again."""

import json
from pathlib import Path

import pytest
import torch

from tests.systems.tokens.fits import enter, fit
from uae.models.captioners.loading import Reading
from uae.rehearsal.catalog import write
from uae.systems.emu3 import Emu3
from uae.types import Sampling

NAMES = ["BAAI/Emu3-Gen-hf", "BAAI/Emu3-Chat-hf", "openai/clip-vit-large-patch14"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    write(folder, only=NAMES)
    return folder


@pytest.fixture
def mirror(folder, monkeypatch, tmp_path):
    return enter(folder, monkeypatch, tmp_path, height=24, width=16)


def small(**settings):
    return Emu3(height=24, width=16, reading=Reading(dtype="float32"), **settings)


def vq_bytes(model):
    return {name: value.detach().numpy().tobytes() for name, value in model.model.vqmodel.state_dict().items()}


@pytest.mark.parametrize("checkpoint", NAMES[:2])
def test_stand_ins_load_by_the_plain_call(mirror, checkpoint):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, report = AutoModelForImageTextToText.from_pretrained(mirror / checkpoint, output_loading_info=True)
    assert not any(report.values())
    processor = AutoProcessor.from_pretrained(mirror / checkpoint)
    assert (type(model).__name__, type(processor).__name__) == ("Emu3ForConditionalGeneration", "Emu3Processor")
    for text in ("  two\n\nlines\t and <b>tags</b>", "naïve café, 日本 🎈"):
        assert processor.tokenizer.decode(processor.tokenizer(text).input_ids) == text


def test_one_network_fills_all_roles(mirror):
    umm = small().build()
    assert umm.captioner.learner.network is umm.renderer.learner.network
    assert umm.renderer.modules() == []
    assert umm.captioner.instruction.startswith("Describe this image")
    rollout = umm.captioner.sample(umm.captioner.prepare(torch.rand(2, 3, 24, 24)), 2, Sampling(max_tokens=6), range(4))
    images = umm.renderer.render(umm.conditioner.encode(rollout.texts, rollout), range(4))
    assert images.shape == (4, 3, 24, 16)
    assert images.min() >= 0
    assert images.max() <= 1
    assert images.std() > 0.01


@pytest.mark.parametrize("train", ["captions", "both"])
@pytest.mark.parametrize("finetune", ["lora", "full"])
def test_three_steps_and_back(mirror, tmp_path, finetune, train):
    """Trained, exported, and read again by the configuration's own path."""
    extra = ["--model.init_args.optimizer.init_args.lr=0.003", f"--model.init_args.train={train}"]
    run = fit("emu3", f"finetune/{finetune}_pretrained.yaml", extra=extra)
    assert run.trainer.global_step == 3
    assert json.loads((tmp_path / "outputs/emu3/summary.json").read_text())["steps"] == 3
    trained, start = run.model.umm.captioner.learner.network.base, small().build().captioner.learner.network.base
    assert vq_bytes(trained) == vq_bytes(start)
    export = Path(run.trainer.log_dir, "export")
    if finetune == "lora":
        from peft import PeftModel

        again = PeftModel.from_pretrained(start, export).get_base_model()
        weights = {name: value for name, value in again.named_parameters() if "lora_" in name}
        assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)
        expected = dict(trained.named_parameters())
        assert all(torch.equal(value, expected[name]) for name, value in weights.items())
        return
    again = small(checkpoint=str(export)).build().captioner.learner.network.base
    expected = trained.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())
    assert not torch.equal(again.lm_head.weight, start.lm_head.weight)


# ---------------------------------------------------------------------------------------------------------- mistakes


def test_a_budget_of_pixels_bounds_what_is_read(mirror):
    def tokens(**budget):
        system = Emu3(height=24, width=16, reading=Reading(dtype="float32", **budget))
        captioner = system.build().captioner
        context = captioner.prepare(torch.rand(1, 3, 64, 64))
        return int((context.rows["input_ids"] >= captioner.learner.network.first).sum())

    assert tokens() == 9
    assert tokens(max_pixels=256) == 4
    with pytest.raises(ValueError, match="between 1024 and 576 pixels; allowed: 0 < min_pixels"):
        tokens(min_pixels=1024)
    with pytest.raises(ValueError, match="between 0 and"):  # 0 is a value, and not the checkpoint's own
        tokens(min_pixels=0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": "BAAI/Emu3-Stage1"}, r"original layout.*system.init_args.checkpoint.*BAAI/Emu3-Gen-hf"),
        ({"checkpoint": "openai/clip-vit-large-patch14"}, r"model_type 'clip.*'; allowed: emu3"),
        ({"template": "draw"}, r"has no \{caption\}"),
    ],
)
def test_what_is_not_emu3_is_refused(mirror, settings, message):
    with pytest.raises(ValueError, match=message):
        small(**settings).build()


def test_a_plan_needs_no_weights(mirror, monkeypatch):
    monkeypatch.delenv("UAE_CHECKPOINTS")
    blueprint = Emu3().blueprint()
    parameters = sum(parameter.numel() for parameter in blueprint.policy.parameters())
    assert 8.4e9 < parameters < 8.7e9  # published as 8B; the VQ model's are buffers
    assert blueprint.prompt_tokens == 4096 + 64 + 128
