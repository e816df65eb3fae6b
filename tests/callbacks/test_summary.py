import json

import pytest

from callbacks.summary import table


def metrics(cli):
    return {name: float(value) for name, value in cli.trainer.callback_metrics.items()}


def test_before_and_after_are_whole_validations(command, run):
    """Against Lightning's own ``validate`` of the untouched model and of the last checkpoint."""
    before, after = run.summary["before"], run.summary["after"]
    assert before == pytest.approx(metrics(command("validate")), abs=1e-6)
    last = run.folder / "checkpoints/last.ckpt"
    assert after == pytest.approx(metrics(command("validate", "--ckpt_path", last)), abs=1e-6)
    assert {"unified_score/held_out", "caption/full", "val_reward/mean"} <= set(before)
    assert before != after
    assert run.summary["steps"] == 4
    assert 0 < run.summary["seconds"] < 600
    assert {"caption", "condition", "render", "reward", "update"} <= run.summary["stages"].keys()
    assert 0 < sum(run.summary["stages"].values()) < run.summary["seconds"]


def test_the_curves_begin_at_step_0_and_end_with_the_summary(run, events):
    for name, value in run.summary["before"].items():
        first, *_, last = events.Scalars(name)
        assert (first.step, first.value) == (0, pytest.approx(value, abs=1e-6))
        assert last.value == pytest.approx(run.summary["after"][name], abs=1e-6)


def test_a_resumed_run_keeps_its_start(command, run):
    last = run.folder / "checkpoints/last.ckpt"
    command("fit", "--run_name", "resumed", "--ckpt_path", last, "--trainer.max_steps", 6)
    summary = json.loads((command.folder / "outputs/resumed/summary.json").read_text())
    assert summary["before"] == run.summary["before"]
    assert summary["steps"] == 6
    assert summary["seconds"] > run.summary["seconds"] * 0.9  # the first part counts
    of_before = {stage: seconds for stage, seconds in run.summary["stages"].items() if stage != "update"}
    assert all(summary["stages"][stage] >= seconds for stage, seconds in of_before.items())  # both are rounded to milliseconds
    assert summary["stages"]["caption"] > of_before["caption"]
    assert sum(summary["stages"].values()) > sum(run.summary["stages"].values()) * 0.9


def test_other_subcommands_leave_the_record_alone(command, run):
    files = {file: file.read_bytes() for file in (run.folder / "config.yaml", run.folder / "summary.json")}
    command("test", "--run_name", "short")
    assert all(file.read_bytes() == content for file, content in files.items())
    assert (run.folder / "test/config.yaml").is_file()


def test_table():
    stages = {"caption": 10.2, "reward": 0.1, "update": 30.0}
    lines = table({"a": 0.25, "gone": 1.0}, {"a": 0.5, "new": -1.0}, 7, 61.4, stages).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["a", "0.2500", "0.5000", "+0.2500"],
        ["gone", "1.0000"],
        ["new", "-1.0000"],
    ]
    assert lines[2].index("1.0000") < lines[3].index("1.0000")  # a missing end leaves its column empty
    assert lines[-2:] == ["7 steps in 61 s", "of these: update 30 s, caption 10 s, validation and all else 21 s"]
    assert table({}, {}, 7, 61.4, {}).endswith("7 steps in 61 s")


def test_generation_is_scored_at_every_validation(command):
    """The renderer of the random miniature is frozen, and its prompts and noise are fixed: nothing changes."""
    extra = ["--trainer.callbacks+=uae.miniature.callbacks.mini_geneval.MiniGenEval", "--trainer.callbacks.prompts=2"]
    extra += ["--run_name=drawn"]
    command("fit", *extra)
    summary = json.loads((command.folder / "outputs/drawn/summary.json").read_text())
    names = {f"generation/{name}" for name in ("single", "two", "counting", "background", "position", "size", "overall")}
    before, after = ({name: summary[when][name] for name in names} for when in ("before", "after"))
    assert before == after
