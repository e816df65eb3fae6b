"""A run that goes on by the command line with other settings: they are in force, and one line names them."""

from pathlib import Path

import pytest
import torch
import yaml

from uae.cli import main

ROOT = Path(__file__).parents[2]
FILES = ("configs/tiny.yaml", "configs/debug/fast.yaml", "tests/untrained.yaml")
LR = "model.init_args.optimizer.init_args.lr"
KEEP = {
    "class_path": "callbacks.checkpoint.RolloutCheckpoint",
    "init_args": {"every_n_train_steps": 2, "filename": "{step}", "save_top_k": -1},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def fit(folder, monkeypatch):
    """Runs ``fit`` and returns its last checkpoint and what it said."""
    monkeypatch.chdir(folder)
    Path("keep.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [KEEP]}}))
    files = [word for file in (*(ROOT / file for file in FILES), "keep.yaml") for word in ("--config", str(file))]

    def run(name, steps, *words):
        off = ["--trainer.limit_val_batches=0", "--trainer.num_sanity_val_steps=0"]
        said = []
        monkeypatch.setattr("uae.checkpoints.resuming.rank_zero_info", said.append)
        main(["fit", *files, *off, "--run_name", name, f"--trainer.max_steps={steps}", *words])
        checkpoint = Path(f"outputs/{name}/checkpoints/step={steps}.ckpt")
        content = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else None
        return content, said

    return run


@pytest.fixture
def begun(fit, folder):
    if not (folder / "outputs/begun").exists():
        fit("begun", 2)
    return "--ckpt_path=outputs/begun/checkpoints/step=2.ckpt"


def told(said):
    return [line for line in said if line.startswith("resumed at step")]


def test_other_settings_are_in_force_and_named_in_one_line(fit, begun):
    before = torch.load(begun.removeprefix("--ckpt_path="), weights_only=True)
    after, said = fit("other", 4, begun, f"--{LR}=1e-9", "--data.init_args.batch_size=4", "--seed_everything=3")
    (group,) = after["optimizer_states"][0]["param_groups"]
    assert group["lr"] == 1e-9
    moved = max((after["state_dict"][name] - weight).abs().max() for name, weight in before["state_dict"].items())
    assert moved < 1e-7
    (line,) = told(said)
    for change in (f"{LR}: 0.02 -> 1e-09", "data.init_args.batch_size: 2 -> 4", "seed_everything: 0 -> 3"):
        assert change in line
    assert line.startswith("resumed at step 2 with other settings, which are in force from here: ")
    assert "run_name" not in line


def test_the_same_settings_need_no_line(fit, begun):
    assert told(fit("same", 2, begun)[1]) == []


def test_a_run_that_has_reached_its_steps_says_so(fit, begun):
    _, said = fit("small", 1, begun)
    (line,) = (line for line in said if line.startswith("nothing is left"))
    assert line == "nothing is left to train: the checkpoint is at step 2, and trainer.max_steps=1; to go on, raise trainer.max_steps"


def test_another_optimizer_is_one_line(fit, begun, capfd):
    with pytest.raises(SystemExit, match="2"):
        fit("sgd", 4, begun, "--model.init_args.optimizer=torch.optim.SGD", f"--{LR}=0.1")
    *_, line = capfd.readouterr().err.splitlines()
    assert line.startswith("error: model.init_args.optimizer is SGD (its state of a weight: nothing), but the checkpoint is that of")


def test_an_adapter_of_another_run_must_have_the_same_rank(fit, begun, capfd):
    Path("export.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": "callbacks.export.Export"}]}}))
    fit("exported", 2, "--config=export.yaml", "--model.init_args.finetune.init_args.rank=4")
    key = "model.init_args.finetune.init_args"
    adapter = f"--{key}.adapter=outputs/exported/export"
    with pytest.raises(SystemExit, match="2"):
        fit("refused", 2, adapter)
    *_, line = capfd.readouterr().err.splitlines()
    assert line == f"error: {key}.rank=16, but {key}.adapter='outputs/exported/export' has 4; allowed: 4, or null in a file"
    fit("taken", 2, adapter, f"--{key}.rank=4")
    Path("rank.yaml").write_text("model: {init_args: {finetune: {init_args: {rank: null}}}}")
    fit("taken", 2, "--config=rank.yaml", adapter)
