"""What is said while a run goes: lines that name step, reward and remaining time, or one bar."""

import io
import re

import pytest

from tests.conftest import data
from uae.console import progress
from uae.console.ending import ending, without
from uae.console.progress import Progress
from uae.stopwatch import Stopwatch, tell


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    time = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: time[0])
    return time


def run(trainer, build, shown, **changes):
    changes = {"max_steps": 8, "limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 4, **changes}
    made = trainer(callbacks=[shown], enable_progress_bar=True, **changes)
    made.fit(build(mini_batches=2), data(batch_size=2))


def test_lines_without_a_terminal(trainer, build, capsys):
    run(trainer, build, Progress(every=0, terminal=False))
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert "\r" not in out + err
    steps = [line for line in lines if re.fullmatch(r"step \d/8  reward -?\d\.\d{3}  \d+\.\d\d s per step(  \d+:\d\d left)?", line)]
    assert [line.split()[1] for line in steps] == [*(f"{step}/8" for step in range(1, 9)), "8/8"]
    assert "left" in steps[0]
    assert "left" not in steps[-1]
    validations = [line for line in lines if line.startswith("validation ")]
    assert [line.partition(":")[0][11:] for line in validations] == ["before training", "at step 4", "at step 8"]
    assert all("val_reward/mean" in line for line in validations)
    assert any(line == "step 0: drawing" for line in lines)  # while the first rollout takes its time


def test_the_first_rollout_is_told_and_then_there_is_silence(trainer, build, capsys):
    run(trainer, build, Progress(every=3600, terminal=False), limit_val_batches=0)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.startswith("step")] == ["2/8", "8/8"]


def test_one_bar_on_a_terminal(trainer, build, monkeypatch, capsys):
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(progress, "REFRESH", 0)
    run(trainer, build, Progress(terminal=True))
    shown = screen.getvalue()
    last = shown.rstrip().split("\r")[-1]
    assert re.search(r"100%\|.*\| 8/8 steps, reward -?\d\.\d{3}", last)
    assert all(stage in shown for stage in ("writing captions", "drawing", "rewarding", "updating"))
    assert "Epoch" not in shown
    assert "validation at step 4" in capsys.readouterr().out


def test_remaining_time_follows_from_the_pace(clock, capsys):
    """Two steps of ten seconds each: eight more take eighty."""
    shown = Progress(every=0, terminal=False)
    shown._total, shown._begun = 10.0, 1000.0
    clock[0] += 20
    shown._say(2, "step", "")
    assert capsys.readouterr().out == "step 2/10  10.00 s per step  1:20 left\n"


def test_other_processes_are_silent_and_hear_nothing(trainer, build, capsys):
    shown = Progress(every=0, terminal=False)
    shown.disable()
    run(trainer, build, shown)
    assert all(line.startswith("data of train") for line in capsys.readouterr().out.splitlines())  # of the data module


def test_nobody_listens_after_a_run():
    heard = []
    end = tell(heard.append)
    with Stopwatch()("render"):
        pass
    end()
    end()
    with Stopwatch()("reward"):
        pass
    assert heard == ["render"]


def test_the_command_to_continue_has_each_option_once():
    words = ["fit", "--config", "a.yaml", "--trainer.max_steps", "4", "--ckpt_path=last", "--label.note", "x y"]
    assert without(words, ("--trainer.max_steps", "--ckpt_path")) == ["fit", "--config", "a.yaml", "--label.note", "x y"]


def test_a_run_without_checkpoints_has_no_command_to_continue(tmp_path):
    text = ending(tmp_path, tmp_path, ["fit"], 10, tensorboard=False)
    assert text == f"folder: {tmp_path}"
