import errno
import json
import os

import pytest

from uae.bench.__main__ import COMMANDS, main
from uae.bench.arguments import run
from uae.bench.result import read_result, score, write_result
from uae.metrics.intervals import wilson


def count(folder: str, limit: int = 4) -> tuple[str, int]:
    """Count.

    Args:
        folder: Which.
        limit: At most.
    """
    return folder, limit


def test_a_function_is_a_command(tmp_path):
    assert run("count", count, ["--folder", "a"]) == ("a", 4)
    (tmp_path / "c.yaml").write_text("folder: b\nlimit: 5\n")
    assert run("count", {"one": count}, ["one", "--config", str(tmp_path / "c.yaml"), "--limit=6"]) == ("b", 6)


@pytest.mark.parametrize(
    ("args", "said"),
    [(["--foldr", "a"], "did you mean folder"), (["--folder", "a", "--limit", "x"], "expected int, got x"), ([], "folder")],
)
def test_mistakes_are_one_line(args, said, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("count", count, args)
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error


def test_a_configuration_that_says_something_twice_is_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("folder: a\nlimit: 5\nfolder: b\n")
    with pytest.raises(SystemExit, match="2"):
        run("count", count, ["--config", str(tmp_path / "c.yaml")])
    assert "c.yaml' has the key 'folder' twice, in line 1 and in line 3; remove one of them\n" in capsys.readouterr().err


def test_a_file_that_is_no_configuration_is_named(tmp_path, capsys):
    (tmp_path / "c.yaml").write_bytes("folder: é".encode("latin-1"))
    with pytest.raises(SystemExit, match="2"):
        run("count", count, ["--config", str(tmp_path / "c.yaml")])
    assert "c.yaml is not UTF-8 text (at byte 8): save it as UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.ENAMETOOLONG, errno.EROFS])
def test_results_that_cannot_be_written_are_of_the_output(code, monkeypatch, capsys):
    def full(args):
        raise OSError(code, os.strerror(code), "somewhere")

    monkeypatch.setattr("uae.bench.report.command.main", full)
    with pytest.raises(SystemExit, match="2"):
        main(["report"])
    assert capsys.readouterr().err.endswith(f"{os.strerror(code)}: 'somewhere': make room or correct --output\n")


def test_usage_and_unknown_commands(capsys):
    main([])
    said = capsys.readouterr().out
    assert all(name in said for name in COMMANDS)
    with pytest.raises(SystemExit, match="2"):
        main(["scor"])
    assert "unknown command 'scor'" in capsys.readouterr().err


def test_a_result_is_whole_and_says_what_was_measured(tmp_path):
    path = tmp_path / "deep" / "result.json"
    scores = {"overall": score(wilson(9, 20), 20)}
    written = write_result(path, "geneval", "ours", scores, {"detector": "x"}, {"prompts": "0" * 64}, tasks={"two": 1.0})
    assert read_result(path) == written
    assert written["scores"]["overall"] == pytest.approx({"value": 0.45, "n": 20, "low": 0.25816, "high": 0.65792}, abs=1e-4)
    assert written["tasks"] == {"two": 1.0}
    assert "torch" in written["versions"]
    with pytest.raises(ValueError, match="JSON"):  # numbers that are none would be read by nobody
        write_result(path, "geneval", "ours", {"overall": {"value": float("nan")}}, {}, {})
    assert read_result(path) == written
    (tmp_path / "other.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match="not a result"):
        read_result(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="no result at"):
        read_result(tmp_path / "none.json")
