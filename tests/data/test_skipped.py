"""Unreadable images: a few warnings, all of them in a file, and a number in the log."""

import json
import warnings

import pytest
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from tests.data.test_sampler import Trivial, trainer
from uae.data import ImageFolderData
from uae.data.sampler import LOUD
from uae.data.skipped import Skipped


@pytest.fixture
def folder(tmp_path):
    """Twelve images and nine files that are none."""
    (tmp_path / "images").mkdir()
    for number in range(12):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{number}.png")
    for number in range(9):
        (tmp_path / "images" / f"bad{number}.png").write_bytes(b"no image")
    return tmp_path


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def data(folder):
    options = {"val_share": 0.0, "test_share": 0.0, "num_workers": 0}
    return ImageFolderData(str(folder / "images"), image_size=4, batch_size=3, **options)


def test_a_run_names_them_in_its_log_directory_and_logs_how_many(folder, capsys):
    logger = CSVLogger(folder, name="run", version="")
    module = data(folder)
    run = trainer(folder, enable_checkpointing=False)
    run.loggers = [logger]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run.fit(Trivial(), module)
    rows = lines(folder / "run" / "skipped.rank0.jsonl")
    assert sorted(row["name"] for row in rows) == [f"bad{number}.png" for number in range(9)]
    assert all(row["reason"].startswith("none of BMP") for row in rows)
    assert sum("unreadable" in str(warning.message) for warning in caught) == LOUD < 9
    logged = (folder / "run" / "metrics.csv").read_text()
    assert "data/skipped" in logged
    assert logged.rstrip().splitlines()[-1].split(",")[0] == "9"
    assert "rank 0: 9 unreadable images skipped" in capsys.readouterr().out


def test_a_name_is_written_once_also_after_a_resume_and_behind_a_broken_line(tmp_path):
    first = Skipped()
    first["a"] = "early"
    first.write_to(tmp_path, 3)
    first["b"] = "x\ny"
    file = tmp_path / "skipped.rank3.jsonl"
    file.write_text(file.read_text() + '{"name": "c", "rea')  # killed while writing
    second = Skipped()
    second.write_to(tmp_path, 3)
    for name in "abcd":
        second[name] = "again"
    assert len(second) == 4
    kept = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
    assert [row["name"] for row in kept] == ["a", "b", "c", "d"]


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path):
    (tmp_path / "file").touch()
    skipped = Skipped()
    skipped.write_to(tmp_path / "file", 0)  # no folder
    with pytest.warns(UserWarning, match="cannot be written"):
        skipped["a"] = "x"
    assert skipped == {"a": "x"}


def test_no_file_without_need(tmp_path):
    Skipped().write_to(tmp_path, 0)
    assert not list(tmp_path.iterdir())
