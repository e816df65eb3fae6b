"""``report.html``: true to the run, whole in one file, and nothing that was written by a model or a user becomes markup."""

import csv
import json
import re

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from tests.report.markup import EVIL, Page
from uae.files import examples
from uae.report.__main__ import main
from uae.report.curves import read_curves
from uae.report.run_page import write_run_page


@pytest.fixture
def folder(tmp_path):
    """What a run leaves, with markup in every name and caption."""
    run = tmp_path / EVIL.replace("/", "|")
    logger = TensorBoardLogger(str(run), "", "full")
    for step in range(30):
        logger.experiment.add_scalar("reward/mean", step / 30, step)
        logger.experiment.add_scalar("policy/kl", 2.0 if step == 17 else 0.1, step)
        logger.experiment.add_scalar(f"time/{EVIL}", 1.0, step)
    logger.experiment.close()
    before = {EVIL: 0.25, "unified_score/held_out": 0.3}
    summary = {"before": before, "after": {EVIL: 0.5}, "steps": 30, "seconds": 65.0, "stages": {EVIL: 13.0}}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "run.json").write_text(json.dumps({"run_name": EVIL, "labels": "full", "started": EVIL}))
    callbacks = "[{class_path: callbacks.health.Health, init_args: {max_kl: 1.0, patience: 10}}]"
    (run / "config.yaml").write_text(
        f"trainer: {{max_steps: 40, callbacks: {callbacks}}}\nmodel:\n  init_args:\n    train: '{EVIL}'\n    group: 8\n"
    )
    image = torch.zeros(3, 24, 24, dtype=torch.uint8)
    one = {"source": [image], "caption": [EVIL], "reconstruction": [image]}
    examples.save(run / "examples.pt", one, one)
    return run


def test_nothing_becomes_markup_and_nothing_is_loaded(folder):
    page = Page(write_run_page(folder).read_text())
    page.check()
    assert sum(EVIL in text for text in page.texts) >= 5  # all of them are shown as they are


def test_the_numbers_are_those_of_the_run(folder):
    text = write_run_page(folder).read_text()
    plain = re.sub(r"\s+", " ", re.sub("<[^>]+>", " ", text))
    assert "0.2500 0.5000 +0.2500" in plain
    assert "30 of 40 steps in 1 min 5 s" in plain
    assert "policy/kl 2 (step 17) at most 1" in plain
    assert "Look at" in plain  # the limit was passed
    assert "13.0 s 20 %" in plain
    assert "validation and all else 52.0 s 80 %" in plain
    assert "group 8" in plain


def test_a_healthy_run_is_not_accused(folder):
    (folder / "config.yaml").write_text("model: {}\n")
    assert "Look at" not in write_run_page(folder).read_text()


def test_csv_and_events_are_the_same_curves(tmp_path, folder):
    curves = read_curves(folder)
    (other := tmp_path / "other/csv/version_0").mkdir(parents=True)
    with (other / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["step", *curves])
        writer.writeheader()
        for tag, curve in curves.items():
            writer.writerows({"step": step, tag: value} for step, value in curve)
    assert read_curves(tmp_path / "other") == curves
    assert len(curves["reward/mean"]) == 30


def test_a_run_that_went_on_counts_once(tmp_path):
    """Killed after step 9, continued from step 5: what was logged last counts."""
    for version, steps, value in ((0, range(10), 0.0), (1, range(5, 8), 1.0)):
        (folder := tmp_path / f"csv/version_{version}").mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,loss\n" + "".join(f"{step},{value}\n" for step in steps) + "8,nan\n9,\n")
    assert read_curves(tmp_path)["loss"] == [(step, float(5 <= step < 8)) for step in range(10)]


def test_a_folder_without_a_run_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert "is not the folder of a run" in line
