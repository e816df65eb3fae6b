"""``python -m uae.check``: a table, a file, and a status that says whether all is well."""

import json
from pathlib import Path

import pytest

from uae.check.command import main

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs/tiny.yaml")
SMALL = ["--config", str(ROOT / "tests/untrained.yaml")]


@pytest.fixture(autouse=True)
def command_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["uae"])


def status(*words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    return stop.value.code


def test_a_sound_system(capsys, tmp_path):
    assert status(TINY, *SMALL, "--json", "check.json") == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "check.json").read_text())[TINY]
    assert {one["verdict"] for one in report.values()} == {"passed", "not applicable"}
    lines = out.splitlines()
    assert lines[0] == TINY
    assert [line[2:].split("  ")[0] for line in lines[2 : 2 + len(report)]] == list(report)
    passed = sum(one["verdict"] == "passed" for one in report.values())
    assert f"{passed} passed, 0 failed, {len(report) - passed} not applicable" in out
    assert not list(tmp_path.glob("outputs/*"))  # nothing was run


def test_a_fault(capsys):
    words = [TINY, *SMALL, "--model.init_args.system.class_path=tests.check.systems.FaultyTiny"]
    assert status(*words) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "failed:" in line]
    assert line.split()[:2] == ["pictures:", "range"]
    assert "1 failed" in out
    assert "docs/checking.md" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["--config", TINY], "no system before '--config'"),
        ([TINY, "--json"], "--json needs a file"),
        ([TINY, "--json", "no/where.json"], "there is no folder 'no'"),
        ([TINY, "--model.init_args.grup=3"], "grup"),
        ([str(ROOT / "configs/pretrain/clip.yaml")], "uae.check is about systems that learn from rewards"),
        ([TINY, "--model.init_args.system.init_args.weights=nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_checked_is_one_line(capsys, words, message):
    assert status(*words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
