"""Every run has a folder of its own: nothing of another run is overwritten, mixed in or deleted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import peft
import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText

from tests.callbacks.test_export import logits
from tests.tiny_random import RandomTiny
from uae import cli
from uae.checkpoints.files import read
from uae.cli.run_folder import Labels, Runs, lock, taken

ROOT = Path(__file__).parents[2]
FULL = ROOT / "configs/finetune/full.yaml"
FILES = [ROOT / "configs/tiny.yaml", ROOT / "configs/debug/fast.yaml", ROOT / "tests/untrained.yaml"]
QUICK = [f"--trainer.{name}=0" for name in ("limit_val_batches", "limit_test_batches", "num_sanity_val_steps")]
WORDS = [word for file in FILES for word in ("--config", str(file))] + QUICK


@pytest.fixture
def command(monkeypatch, tmp_path):
    """The command line in an empty folder."""
    monkeypatch.setattr("sys.argv", ["uae"])
    monkeypatch.chdir(tmp_path)
    return lambda subcommand, *words: cli.main([subcommand, *WORDS, *map(str, words)])


@pytest.fixture
def refused(command, capfd):
    """The single line with which a command is refused."""

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            command(*words)
        assert stop.value.code == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return run


def content(folder):
    """Every file below a folder, to the byte."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def step(folder):
    return read(folder / "checkpoints/last.ckpt")["global_step"]


def test_lora_full_and_lora_again_with_one_name(command, tmp_path, capfd):
    """All three are complete, tell each other apart in TensorBoard, and export what plain libraries load."""
    outputs = tmp_path / "outputs"
    before = {}
    runs = {"tiny": command("fit")}
    before["tiny"] = content(outputs / "tiny")
    runs["tiny-2"] = command("fit", "--config", FULL)
    before["tiny-2"] = content(outputs / "tiny-2")
    runs["tiny-3"] = command("fit", "--seed_everything", 5)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("results: ")]
    taken_by_another = "outputs/tiny is another run's"
    assert lines == ["results: outputs/tiny", *(f"results: outputs/tiny-{n}; {taken_by_another}" for n in (2, 3))]
    assert before == {name: content(outputs / name) for name in before}
    events = {path.parent.relative_to(outputs).as_posix() for path in outputs.rglob("events*")}
    assert events == {"tiny", "tiny-2/full", "tiny-3"}
    for name, run in runs.items():
        folder = outputs / name
        assert (json.loads((folder / "summary.json").read_text())["steps"], step(folder)) == (4, 4)
        assert "Full" in (folder / "config.yaml").read_text() or name != "tiny-2"
        files = {path.name for path in (folder / "export").iterdir()}
        assert ("adapter_config.json" in files, "config.json" in files) == (name != "tiny-2", name == "tiny-2")
        if name == "tiny-2":
            loaded = AutoModelForImageTextToText.from_pretrained(folder / "export")
        else:
            loaded = peft.PeftModel.from_pretrained(RandomTiny().build().captioner.learner.network.model, folder / "export")
        torch.testing.assert_close(logits(loaded), logits(run.model.umm.captioner.learner.network.model))


def test_runs_that_begin_at_the_same_moment_get_different_folders(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(lambda _: Runs(tmp_path, "group/x").start(), range(64)))
    assert len(set(folders)) == 64
    assert Path(tmp_path, "group/x") in folders


def test_two_runs_at_once_one_of_them_killed(tmp_path):
    """The folder of each holds the files of one run only, and the killed one can go on."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    base = [sys.executable, "-m", "uae.cli", "fit", *WORDS, "--trainer.callbacks+", "tests.callbacks.beacon.Beacon"]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    endless = subprocess.Popen([*base, "--trainer.max_steps=100000", "--seed_everything=1"], cwd=tmp_path, env=environment, **silent)
    try:
        deadline = time.monotonic() + 200
        while not (tmp_path / "beacon").exists():
            assert endless.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        subprocess.run([*base, "--seed_everything=2"], cwd=tmp_path, env=environment, check=True, timeout=200, **silent)
    finally:
        endless.send_signal(signal.SIGKILL)
        endless.wait()
    first, second = tmp_path / "outputs/tiny", tmp_path / "outputs/tiny-2"
    assert [yaml.safe_load((f / "config.yaml").read_text())["seed_everything"] for f in (first, second)] == [1, 2]
    assert step(second) == json.loads((second / "summary.json").read_text())["steps"] == 4
    assert not (first / "summary.json").exists()
    assert len(list(first.glob("events*"))) == 1
    assert Runs(tmp_path / "outputs", "tiny").existing() == [first, second]


def test_nobody_continues_a_run_that_is_still_running(command, refused, monkeypatch, tmp_path):
    monkeypatch.setattr("uae.cli.run_folder.PATIENCE", 0.1)
    command("fit")
    before = content(tmp_path / "outputs/tiny/checkpoints")
    guard = lock(tmp_path / "outputs/tiny")
    assert "another process writes to 'outputs/tiny': wait for its end" in refused("fit", "--ckpt_path", "last")
    guard.release()
    assert before == content(tmp_path / "outputs/tiny/checkpoints")
    command("fit", "--ckpt_path", "last", "--trainer.max_steps", 6)
    assert step(tmp_path / "outputs/tiny") == 6


def test_where_a_run_goes_on(command, tmp_path, capfd):
    """``last`` is of the same name and labels; a checkpoint before the end, or of another name, begins a new run."""
    outputs = tmp_path / "outputs"
    keep = ["--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.save_top_k=-1"]
    command("fit", *keep)
    command("fit", "--config", FULL)
    for words, folder in (
        (["--ckpt_path", "last", "--trainer.max_steps", 6], "tiny"),
        (["--ckpt_path", "outputs/tiny/checkpoints/step=6.ckpt", "--trainer.max_steps", 8], "tiny"),
        (["--ckpt_path", "outputs/tiny/checkpoints/step=2.ckpt", "--trainer.max_steps", 4], "tiny-3"),
        (["--ckpt_path", "last", "--trainer.max_steps", 6], "tiny-3"),
        (["--ckpt_path", "outputs/tiny/checkpoints/last.ckpt", "--run_name", "other", "--trainer.max_steps", 10], "other"),
        (["--ckpt_path", "last", "--label.note", "b"], "tiny-4"),  # there is none of these labels yet
    ):
        unchanged = {path: content(path) for path in outputs.iterdir() if path.name != folder}
        capfd.readouterr()
        command("fit", *keep, *words)
        (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("results: ")]
        assert line.split()[1].strip(",;") == f"outputs/{folder}"
        assert unchanged == {path: content(path) for path in unchanged}
    assert [step(outputs / name) for name in ("tiny", "tiny-2", "tiny-3", "other", "tiny-4")] == [8, 4, 6, 10, 4]


def test_last_goes_on_in_a_folder_of_copied_checkpoints(command, tmp_path):
    command("fit")
    shutil.copytree(tmp_path / "outputs/tiny/checkpoints", tmp_path / "outputs/copy/checkpoints")
    command("fit", "--run_name", "copy", "--ckpt_path", "last", "--trainer.max_steps", 6)
    assert (step(tmp_path / "outputs/tiny"), step(tmp_path / "outputs/copy")) == (4, 6)


def test_every_evaluation_has_a_folder_below_the_run_that_it_is_of(command, tmp_path):
    outputs = tmp_path / "outputs"
    command("fit")
    command("fit")
    command("test", "--ckpt_path", "outputs/tiny-2/checkpoints/last.ckpt")
    command("test", "--ckpt_path", "outputs/tiny/checkpoints/last.ckpt")
    before = content(outputs / "tiny/test")
    command("test", "--ckpt_path", "outputs/tiny/checkpoints/last.ckpt")
    command("validate", "--ckpt_path", "last")
    command("validate")  # of no checkpoint, so of no run
    assert sorted(path.relative_to(outputs).as_posix() for path in outputs.glob("*/*") if path.name[:4] in ("test", "vali")) == [
        "tiny-2/test", "tiny-2/validate", "tiny/test", "tiny/test-2", "tiny/validate",
    ]  # fmt: skip
    assert content(outputs / "tiny/test") == before


def test_a_folder_in_which_nothing_ran_is_free(command, refused, tmp_path):
    """Evaluations, a log of the user's, and a start that failed do not take the name."""
    command("validate")
    (tmp_path / "outputs/tiny/log.txt").write_text("mine")
    refused("fit", "--model.init_args.ratio_tolerance=-1")  # found at the first rollout
    refused("fit", "--ckpt_path", "nowhere.ckpt")
    command("fit")
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["tiny"]
    assert step(tmp_path / "outputs/tiny") == 4
    assert (tmp_path / "outputs/tiny/log.txt").read_text() == "mine"


@pytest.mark.parametrize("logger", [None, "lightning.pytorch.loggers.CSVLogger"])
def test_everything_goes_below_default_root_dir(command, tmp_path, logger):
    words = ["--trainer.logger", logger, "--trainer.logger.save_dir", "elsewhere/csv"] if logger else []
    command("fit", "--trainer.default_root_dir", "elsewhere", *words)
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]
    names = {path.name.split(".")[0] for path in (tmp_path / "elsewhere/tiny").iterdir()}
    assert names >= {"checkpoints", "config", "export", "summary", "run", *([] if logger else ["events"])}


def test_a_folder_of_checkpoints_that_is_given_is_not_shared(command, refused, tmp_path):
    words = ["--trainer.callbacks.dirpath", "mine"]
    command("fit", *words)
    before = content(tmp_path / "mine")
    assert "mine' of a checkpoint callback holds checkpoints of another run" in refused("fit", *words)
    assert content(tmp_path / "mine") == before
    command("fit", *words, "--ckpt_path", "last", "--trainer.max_steps", 6)


def test_a_dry_run_takes_no_folder(command, tmp_path):
    command("fit", "--trainer.fast_dev_run", 2)
    assert not taken(tmp_path / "outputs/tiny")


def test_labels_of_fragments_are_joined(command, tmp_path):
    words = [word for name in ("finetune/full", "reward/random") for word in ("--config", ROOT / f"configs/{name}.yaml")]
    command("fit", *words, "--label.note", "lr=1e-4")
    assert [path.parent.name for path in (tmp_path / "outputs/tiny").rglob("events*")] == ["full-random-lr=1e-4"] * len(
        list((tmp_path / "outputs/tiny").rglob("events*"))
    )


@pytest.mark.parametrize("label", ["a/b", "..", "", " ", "a b"])
def test_a_label_is_the_name_of_a_folder(label):
    with pytest.raises(ValueError, match=r"label\.note=.*; allowed: "):
        Labels(note=label)


AXES = {"finetune": "finetune", "stages": "stage", "reward": "reward", "loss": "loss"}  # folder to label
LABELLED = [file for axis in AXES for file in sorted((ROOT / "configs" / axis).glob("*.yaml"))]


@pytest.mark.parametrize("file", LABELLED, ids=lambda path: path.stem)
def test_fragments_that_change_what_a_run_is_say_so(file):
    (axis,) = yaml.safe_load(file.read_text())["label"]
    assert axis == AXES[file.parent.name]
