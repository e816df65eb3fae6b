"""Stages by one command: each starts from what the one before exported, and both halves are kept."""

import json
from pathlib import Path

import peft
import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from uae import cli

ROOT = Path(__file__).parents[2]
CAPTIONS = ROOT / "configs/stages/generation_for_understanding.yaml"
IMAGES = ROOT / "configs/stages/understanding_for_generation.yaml"
FILES = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"]
SHORT = [
    "--trainer.max_steps=2", "--trainer.limit_val_batches=1", "--trainer.val_check_interval=2", "--data.init_args.val_size=4",
    "--data.init_args.eval_batch_size=4", "--trainer.enable_progress_bar=false",
]  # fmt: skip
WORDS = ["fit", *(word for file in FILES for word in ("--config", str(file))), *SHORT]
THREE = [f"--stage={CAPTIONS}", "--stage", f"{IMAGES} --model.init_args.reconstructions 2", f"--stage={CAPTIONS}"]
SECOND, THIRD = "2-understanding_for_generation", "3-generation_for_understanding"


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty folder, in which commands run."""
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(folder):
    return (folder / "adapter_model.safetensors").read_bytes()


def refusal(words, capfd):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, words)))
    assert stop.value.code == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_stages_are_the_runs_that_one_would_start_by_hand(folder):
    cli.main([*WORDS, *THREE, "--run_name=chain"])
    chain = folder / "outputs/chain"

    cli.main([*WORDS, "--config", str(CAPTIONS), "--run_name=one"])
    first = folder / "outputs/one/export"
    adapter = f"--model.init_args.finetune.init_args.adapter={first}"
    cli.main([*WORDS, "--config", str(IMAGES), adapter, "--model.init_args.reconstructions=2", "--run_name=two"])
    second = folder / "outputs/two/export"
    drawn = ["--model.init_args.image_finetune=uae.models.finetune.LoRA"]
    drawn.append(f"--model.init_args.image_finetune.init_args.adapter={second / 'renderer'}")
    cli.main([*WORDS, "--config", str(CAPTIONS), adapter, *drawn, "--run_name=three"])
    third = folder / "outputs/three/export"

    for part, one in (("export", first), (f"{SECOND}/export", second), (f"{THIRD}/export", third)):
        assert weights(chain / part) == weights(one)
    assert weights(chain / SECOND / "export") == weights(chain / "export") != weights(chain / THIRD / "export")
    assert weights(chain / SECOND / "export/renderer") == weights(second / "renderer")
    assert weights(chain / THIRD / "export/renderer") == weights(chain / SECOND / "export/renderer")
    assert not (chain / "export/renderer").exists()
    columns = json.loads((chain / "stages.json").read_text())
    assert list(columns) == ["start", "1 captions", "2 images", "3 captions"]
    assert columns["2 images"] == json.loads((chain / SECOND / "summary.json").read_text())["after"]
    assert (chain / "stages.png").is_file()


def test_a_stage_draws_with_what_an_earlier_one_learnt(folder):
    pictures = f"{IMAGES} --model.init_args.reconstructions 2 --model.init_args.image_lr 0.1"
    cli.main([*WORDS, "--stage", pictures, f"--stage={CAPTIONS}", "--run_name=chain"])
    columns = json.loads((folder / "outputs/chain/stages.json").read_text())
    assert columns["2 captions"]["val_reward/mean"] != columns["start"]["val_reward/mean"]
    before = json.loads((folder / "outputs/chain/2-generation_for_understanding/summary.json").read_text())["before"]
    assert before["unified_score/layout"] == pytest.approx(columns["1 images"]["unified_score/layout"], abs=1e-6)
    assert before["unified_score/layout"] != pytest.approx(columns["start"]["unified_score/layout"], abs=1e-6)


def test_whole_weights_go_on_as_adapters_do(folder):
    full = ["--config", str(ROOT / "configs/finetune/full.yaml")]
    image = f"{IMAGES} --model.init_args.reconstructions 2 --model.init_args.image_finetune uae.models.finetune.Full"
    cli.main([*WORDS, *full, f"--stage={CAPTIONS}", "--stage", image, f"--stage={CAPTIONS}", "--run_name=chain"])
    first, last = folder / "outputs/chain/export", folder / f"outputs/chain/{THIRD}/export"
    second = folder / f"outputs/chain/{SECOND}/export"
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    name = "renderer/diffusion_pytorch_model.safetensors"
    assert (second / name).read_bytes() == (last / name).read_bytes()
    before, after = (load_file(one / "model.safetensors") for one in (first, last))
    assert before.keys() == after.keys()
    assert 0 < max((before[key] - after[key]).abs().max() for key in before) < 1e-3  # two steps of 1e-4 from there


def test_an_adapter_is_trained_on_exported_weights(folder):
    callbacks = [{"class_path": "callbacks.export.Export", "init_args": {"merge": True}}]
    (folder / "merged.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}}))
    merged, adapter = f"{CAPTIONS} merged.yaml", f"{CAPTIONS}"
    rate = "--model.init_args.optimizer.init_args.lr=1e-3"
    cli.main([*WORDS, rate, "--stage", merged, "--stage", adapter, "--stage", merged, "--run_name=chain"])
    first, second, third = (folder / "outputs/chain" / part / "export" for part in ("", f"2-{CAPTIONS.stem}", THIRD))
    assert json.loads((second / "adapter_config.json").read_text())["base_model_name_or_path"] == str(first.relative_to(folder))
    plain = AutoModelForImageTextToText.from_pretrained(first)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    start = plain.state_dict()[name].clone()
    adapted = peft.PeftModel.from_pretrained(plain, second).merge_and_unload().state_dict()[name]
    final = AutoModelForImageTextToText.from_pretrained(third).state_dict()[name]
    assert not torch.equal(start, adapted)
    assert not torch.equal(adapted, final)
    torch.testing.assert_close(adapted, final, atol=0.02, rtol=0)  # the third stage goes on from both


def test_one_network_has_one_adapter(folder):
    words = ["fit", "--config", str(ROOT / "configs/tiny_janus.yaml"), "--config", str(FILES[1]), *SHORT]
    cli.main([*words, f"--stage={CAPTIONS}", "--stage", f"{IMAGES} --model.init_args.reconstructions 2", "--run_name=chain"])
    first, second = (folder / part / "export" for part in ("outputs/chain", f"outputs/chain/{SECOND}"))
    assert weights(first) != weights(second)
    assert not (second / "renderer").exists()


def test_an_interrupted_chain_goes_on_to_the_same_weights(folder):
    images = f"--stage={IMAGES} --model.init_args.reconstructions=2"
    longer = [f"--stage={CAPTIONS} --trainer.max_steps=4", f"{images} --trainer.max_steps=4"]
    cli.main([*WORDS, *longer, "--run_name=whole"])
    shorter = [longer[0], f"{images} --trainer.max_steps=2"]
    cli.main([*WORDS, *shorter, "--run_name=parts"])
    cli.main([*WORDS, *longer, "--run_name=parts", "--ckpt_path=last"])
    whole, parts = (folder / "outputs" / name / SECOND / "export" for name in ("whole", "parts"))
    assert weights(whole / "renderer") == weights(parts / "renderer")
    assert weights(whole) == weights(parts)
    assert not (folder / "outputs/parts-2").exists()


def test_a_dry_run_tries_every_stage(folder):
    cli.main([*WORDS, *THREE, "--trainer.fast_dev_run=true"])
    assert not (folder / "outputs").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*WORDS, "--stage", "configs/stages/typo.yaml"], "there is no file 'configs/stages/typo.yaml'"),
        ([*WORDS, "--stage", ""], "names no file"),
        ([*WORDS, "--stage", f"{CAPTIONS} --run_name other"], "give run_name, ckpt_path and default_root_dir outside of it"),
        ([*WORDS, "--stage", CAPTIONS, "--print_plan"], "give the stage's file as --config"),
        ([*WORDS, "--stage", CAPTIONS, "--ckpt_path", "some.ckpt"], "allowed: last"),
        (["test", *WORDS[1:], "--stage", CAPTIONS], "--stage is of fit, not of test"),
        ([*WORDS, "--stage", f"{CAPTIONS} --trainer.max_step 3", "--stage", IMAGES], "max_step"),
        ([*WORDS, f"--stage={CAPTIONS}", f"--stage={IMAGES} --trainer.max_step 3"], "max_step"),
    ],
    ids=["no such file", "empty", "name of a stage", "plan", "checkpoint", "test", "typo", "typo in a later stage"],
)
def test_what_cannot_be_done_is_said_before_anything_trains(folder, capfd, words, said):
    assert said in refusal(words, capfd)
    assert not (folder / "outputs").exists()


def test_a_run_without_an_export_cannot_be_followed(folder, capfd):
    words = [*WORDS, "--trainer.callbacks=null", f"--stage={CAPTIONS}", f"--stage={CAPTIONS}"]
    assert "needs callbacks.export.Export" in refusal(words, capfd)
    assert torch.is_grad_enabled()
