"""Captions as supervision: the loss, what trains, and what is read back."""

import json

import pytest
import torch

from tests.coldstart import runs
from tests.tiny_random import RandomTiny
from uae.coldstart import CaptionTuning, ColdStart
from uae.coldstart.system_objective import caption_rollout
from uae.miniature.tiny import END, Tiny
from uae.models.finetune import Full, LoRA
from uae.weights.checksums import checksums


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    return runs.checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(autouse=True)
def not_the_package(checkpoints, monkeypatch, tmp_path):
    """Instead: runs in a folder of their own, with the package's weights."""
    monkeypatch.setenv("UAE_CHECKPOINTS", str(checkpoints))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])


def built(finetune=None, **arguments):
    objective = CaptionTuning(**arguments)
    objective.use(RandomTiny(), finetune or LoRA(rank=4))
    objective.build()
    only_one_end(objective.frozen[0].captioner)
    return objective


def only_one_end(captioner):
    """Random weights rarely end a caption, so the random miniature ends at many words; here they are words."""
    captioner.end_ids = [captioner.processor.tokenizer.eos_token_id]
    return captioner


def test_the_loss_is_the_mean_over_tokens_and_the_end_is_one(checkpoints):
    objective, images = built(), runs.batch(24)
    images["caption"][1] = "a red ring"  # of another length
    (umm,) = objective.frozen
    captioner, model = umm.captioner, umm.captioner.learner.network.base
    words, nats = captioner.processor.tokenizer, []
    for image, caption in zip(images["image"], images["caption"], strict=True):
        context = captioner.prepare(image[None])
        prompt = context.rows["input_ids"]
        ids = torch.cat([prompt, words(f"{caption} {END}", return_tensors="pt").input_ids], dim=1)
        inputs = {**context.inputs(), "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if "mm_token_type_ids" in inputs:
            kinds = inputs["mm_token_type_ids"]
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(kinds, (0, ids.shape[1] - kinds.shape[1]))
        with torch.no_grad():
            logits = model(**inputs).logits[0, prompt.shape[1] - 1 : -1].double()
        logits[:, captioner.learner.network.banned_ids] = -torch.inf
        nats += (-logits.log_softmax(-1).gather(1, ids[0, prompt.shape[1] :, None])).flatten().tolist()
    assert objective(images, 0.0)["loss"].item() == pytest.approx(sum(nats) / len(nats), rel=1e-5)
    assert objective.score(images)["nats"] == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_captions_as_tokens(checkpoints):
    captioner = only_one_end(RandomTiny().build().captioner)
    words = captioner.processor.tokenizer
    texts = ["a red ring", "", "a <|image_pad|> blue <|im_end|> dot"]
    rollout = caption_rollout(captioner, texts, None, max_tokens=4)
    rows = [tokens[mask.bool()].tolist() for tokens, mask in zip(rollout.tokens_NT, rollout.mask_RS, strict=True)]
    end = words.eos_token_id
    assert rows[0] == [*words("a red ring").input_ids, end]
    assert rows[1] == [end]
    assert words.decode(rows[2][:3]).split() == ["a", "blue", words.unk_token]
    assert caption_rollout(captioner, ["a red ring"], None, max_tokens=2).tokens_NT.tolist() == [rows[0][:2]]  # no end
    assert rollout.texts == texts
    assert len(rollout) == 3


@pytest.mark.parametrize("finetune", [LoRA(rank=4), Full(r"layers\.0")])
def test_the_loss_falls_and_gradients_reach_what_trains(checkpoints, finetune):
    objective = built(finetune)
    losses = runs.falls(objective, runs.batch(24))
    assert losses == sorted(losses, reverse=True)
    (umm,) = objective.frozen
    touched = {name for name, p in umm.captioner.learner.network.named_parameters() if p.grad is not None}
    assert touched == {n for n, _ in umm.captioner.learner.network.named_parameters() if "lora_" in n or "layers.0" in n} - {
        n for n, p in umm.captioner.learner.network.named_parameters() if not p.requires_grad
    }
    assert touched
    for part in (umm.conditioner, *umm.renderer.modules()):
        assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("name", ["tiny", "uae", "metaquery"])
def test_three_steps_from_the_command_line(name, tmp_path):
    run = runs.fit(name, "cold_start_captions", "model.init_args.learning_rate=0.003")
    folder = tmp_path / "outputs" / name
    (umm,) = run.model.objective.frozen
    before, again = runs.started_from(run, folder / "cold_start")
    assert not runs.changed(before, umm)
    assert all(runs.adapters(umm.captioner.learner.network).values())
    images = runs.batch(umm.renderer.rendering.height)
    for now, then in zip(runs.outputs(umm, images), runs.outputs(again, images), strict=True):
        torch.testing.assert_close(now, then, atol=1e-4, rtol=0)
    assert (runs.outputs(umm, images)[0] - runs.outputs(before, images)[0]).abs().max() > 1e-3
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["after"]["caption_tuning/nats"] < summary["before"]["caption_tuning/nats"]
    assert not (folder / "export").exists()  # there is no policy of GRPO to export
    saved = torch.load(max((folder / "checkpoints").rglob("*.ckpt")), weights_only=False) if name == "tiny" else None
    assert saved is None or all("lora_" in key for key in saved["state_dict"])


def test_what_full_finetuning_writes_is_a_checkpoint(tmp_path, not_the_package):
    import shutil

    from uae.miniature.tiny import WEIGHTS

    run = runs.fit("tiny", "cold_start_captions", "model.init_args.finetune=Full", "model.init_args.learning_rate=0.001")
    (umm,) = run.model.objective.frozen
    assert runs.changed(Tiny().build(), umm) <= runs.matching(umm, r"^captioner\.(?!.*visual)")
    folder = shutil.copytree(WEIGHTS, tmp_path / "weights")
    shutil.rmtree(folder / "captioner")
    shutil.copytree(tmp_path / "outputs/tiny/cold_start/captioner", folder / "captioner")
    (folder / "checksums.json").write_text(json.dumps(checksums(folder)))
    assert not runs.changed(umm, Tiny(str(folder)).build())


def test_mistakes_are_one_line(tmp_path, capsys):
    def message(*changes, name="tiny", stage="cold_start_captions"):
        with pytest.raises(SystemExit):
            runs.fit(name, stage, *changes)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1
        return error[0]

    from PIL import Image

    for number in range(4):
        Image.new("RGB", (24, 24)).save(tmp_path / f"{number}.png")
    folder = ["data=ImageFolderData", f"data.init_args.root={tmp_path}", "data.init_args.val_share=0"]
    said = message(*folder, "data.init_args.test_share=0", "data.init_args.batch_size=2", "trainer.val_check_interval=1")
    assert "4 of 4 train images have no caption (0.png, 1.png, 2.png, ...)" in said
    assert "data.init_args.root" in said
    assert "model.init_args.system=null" in message("model.init_args.system=null")
    assert "model.init_args.finetune=null" in message("model.init_args.finetune=null")
    assert "max_tokens=0" in message("model.init_args.objective.init_args.max_tokens=0")


def test_a_checkpoint_of_something_else_is_refused():
    model = ColdStart(CaptionTuning(), RandomTiny(), LoRA(rank=4))
    model.configure_model()
    state = {"state_dict": dict(model.state_dict())}
    model.on_save_checkpoint(state)
    assert state["state_dict"]
    assert all("lora_" in name for name in state["state_dict"])
    model.on_load_checkpoint(state)
    state["state_dict"].popitem()
    with pytest.raises(ValueError, match="1 missing"):
        model.on_load_checkpoint(state)
