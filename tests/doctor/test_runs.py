"""A run that is broken in one way has one fault, with the number and the key to change; a healthy one has none."""

import math

import pytest

from tests.doctor.made_up import CONFIG, STEPS, SUMMARY, make
from uae.cli.run_folder import lock
from uae.doctor.__main__ import main, of_run
from uae.doctor.run_folder import read_run


def faults(folder):
    return [finding for finding in of_run(folder) if finding.state == "wrong"]


def logged(tag, *values):
    return {"scalars": {tag: values}}


def steadily(tag, value):
    return logged(tag, *[value] * STEPS)


def after(held_out, reward):
    return {"summary": {**SUMMARY, "after": {"unified_score/held_out": held_out, "val_reward/mean": reward}}}


BROKEN = {
    "no spread": (steadily("reward/std", 0.0), "reward/std=0", "sampling.temperature"),
    "few groups teach": (steadily("reward/zero_variance", 0.7), "reward/zero_variance=0.70", "model.init_args.group"),
    "kl": (steadily("policy/kl", 0.8), "policy/kl stayed at 0.8 or above; allowed: max_kl=0.5", "model.init_args.loss.beta"),
    "kl of images": (steadily("image_policy/kl", 3.0), "image_policy/kl stayed at 3", "model.init_args.optimizer.init_args.lr"),
    "ratio": (steadily("policy/ratio_max", 500.0), "policy/ratio_max stayed at 500", "model.init_args.num_iterations"),
    "sampler": (logged("policy/sampler_gap", 0.2), "sampler_gap=0.2 is above model.init_args.ratio_tolerance=0.001", "precision"),
    "clipped": (steadily("policy/clip_fraction", 0.7), "policy/clip_fraction=0.70", "model.init_args.loss.epsilon_high"),
    "cut off": (steadily("caption/finished", 0.25), "75% of the captions are cut off at model.init_args.sampling", "raise"),
    "reward is no number": (logged("reward/mean", 0.3, math.nan), "reward/mean is not finite at 1 of 2 steps, first at", "reward"),
    "loss is no number": (logged("policy/loss", 0.1, math.inf), "policy/loss is not finite", "lr"),
    "updates skipped": (logged("health/skipped_updates", 0.0, 3.0), "health/skipped_updates=3", "lr"),
    "entropy": (logged("policy/entropy", *[1.0] * 10, *[0.01] * 10), "policy/entropy fell from 1 to 0.01", "sampling.temperature"),
    "learns nothing": (after(0.29, 0.39), "0.300 -> 0.290 has not risen, and neither", "max_steps"),
    "cheats": (after(0.29, 0.9), "while val_reward/mean rose 0.400 -> 0.900", "loss.beta"),
    "alarm": (logged("hacking/alarm", 0.0, 1.0), "hacking/alarm at step 1", "hacking.png"),
    "killed": ({"summary": None}, f"was killed before its end, at step {STEPS} of {STEPS}", "--ckpt_path last"),
    "killed at once": ({"summary": None, "checkpoint": False}, "was killed before its end", "starts again"),
    "interrupted": ({"summary": {**SUMMARY, "steps": 5}}, f"interrupted at step 5 of {STEPS}", "--ckpt_path last"),
    "never began": ({"config": {}, "summary": None}, "ended before it began", "start it again"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "found", "cure"), BROKEN.values(), ids=BROKEN)
def test_what_is_wrong_is_named_with_its_number_and_its_key(tmp_path, capsys, changes, found, cure):
    folder = make(tmp_path / "run", **changes)
    (fault,) = faults(folder)
    assert found in fault.text
    assert cure in fault.cure
    assert main([str(folder)]) == 1
    assert f"WRONG  {fault.text}\n       -> {fault.cure}\n" in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["", "full-note"])
def test_a_healthy_run_has_no_fault(tmp_path, capsys, labels):
    folder = make(tmp_path / "run", labels=labels)
    assert main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "unified_score/held_out 0.300 -> 0.800" in out
    assert "the run has ended after 12 steps" in out
    assert f"the furthest checkpoint is of step {STEPS}" in out
    assert "policy/loss near 0 (1e-03) is normal" in out
    assert out.endswith("faults: 0\n")


def test_limits_are_those_of_the_run_and_hold_for_as_many_rollouts_as_its_patience(tmp_path):
    seldom = [0.0, 0.9] * (STEPS // 2)
    assert not faults(make(tmp_path / "seldom", scalars={"policy/kl": seldom}))
    off = {**CONFIG, "trainer": {"callbacks": [{"class_path": "callbacks.health.Health", "init_args": {"max_kl": None}}]}}
    assert not faults(make(tmp_path / "off", scalars={"policy/kl": [9.0] * STEPS}, config=off))
    short = {**CONFIG, "trainer": {"callbacks": [{"class_path": "callbacks.health.Health", "init_args": {"patience": 2}}]}}
    twice = [0.0] * 5 + [2.0, 2.0] + [0.0] * 5
    (fault,) = faults(make(tmp_path / "short", scalars={"policy/kl": twice}, config=short))
    assert "max_kl=1 " in fault.text  # the default of Health


def test_a_run_that_is_running_is_not_killed(tmp_path):
    folder = make(tmp_path / "run", summary=None)
    guard = lock(folder)
    try:
        assert not faults(folder)
        assert read_run(folder).running
    finally:
        guard.release()
    assert len(faults(folder)) == 1


def test_checkpoints_stacks_and_skipped_images(tmp_path):
    folder = make(tmp_path / "run", checkpoint=False)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step=4.ckpt").write_bytes(b"half")
    (folder / "checkpoints" / "step=8.ckpt.partial").write_bytes(b"half")
    (folder / "stacks").mkdir()
    (folder / "stacks" / "rank1.txt").write_text("step\nTimeout (0:20:00)!\nThread 0x1")
    (folder / "stacks" / "rank0.txt").write_text("a step that did not take too long")
    (folder / "skipped.rank0.jsonl").write_text('{"name": "a.png", "reason": "another suffix"}\n{"name": "b')
    said = [str(finding) for finding in of_run(folder)]
    assert any(line.startswith("WRONG  none of 1 checkpoints") for line in said)
    assert any("step=8.ckpt.partial" in line for line in said)
    assert any(line.startswith("WRONG") and "stacks/rank1.txt" in line and "rank0" not in line for line in said)
    assert any("1 images were left out: another suffix" in line for line in said)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "there is no folder"),
        ({}, "is no folder of a run: it has no run.json, config.yaml or events"),
        ({"summary.json": "{"}, "summary.json' cannot be read"),
        ({"config.yaml": "a: 1\na: 2"}, "config.yaml' cannot be read"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_one_line(tmp_path, capsys, content, line):
    folder = tmp_path / "run"
    for name, text in (content or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    if content == {}:
        make(folder / "inside")
        line += "; runs in it: inside"
    with pytest.raises(SystemExit, match="2"):
        main([str(folder)])
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("error: ")
    assert line in said
