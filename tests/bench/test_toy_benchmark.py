"""What a new benchmark needs: a module with a main, a line in the table of commands, a test. Reports know it then."""

import pytest

from uae.bench import __main__ as bench
from uae.bench.arguments import run
from uae.bench.paired import sign_test
from uae.bench.result import Case, check_output, read_result, summarize, write_result
from uae.metrics.intervals import wilson

QUESTIONS = 20


def count_to(right: int, output: str, system: str = "toy") -> None:
    """A benchmark of twenty questions, of which the first ones are answered correctly.

    Args:
        right: Number of correct answers.
        output: Result file.
        system: Name of the system.
    """
    check_output(output)
    cases = {"overall": [Case(f"question {i}", float(i < right)) for i in range(QUESTIONS)]}
    write_result(output, "toy", system, summarize(cases), {"rule": "counting"}, {"questions": "0" * 64}, cases)


def main(args):
    run("toy", count_to, args)


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setitem(bench.COMMANDS, "toy", bench.Command(__name__, "a benchmark of twenty questions"))
    return bench.main


def test_a_new_benchmark_is_listed_run_and_reported_with_an_interval(command, tmp_path, capsys):
    command([])
    assert "toy            a benchmark of twenty questions" in capsys.readouterr().out
    for system, right in (("before", 8), ("after", 14)):
        command(["toy", "--right", str(right), "--output", str(tmp_path / f"{system}.json"), "--system", system])
    after = wilson(14, QUESTIONS)
    assert read_result(tmp_path / "after.json")["scores"]["overall"] == {
        "value": 0.7, "n": QUESTIONS, "low": pytest.approx(after.low), "high": pytest.approx(after.high),
    }  # fmt: skip
    command(["report", str(tmp_path / "before.json"), str(tmp_path / "after.json")])
    shown = capsys.readouterr().out
    assert "## toy" in shown
    assert f"| 70.00 [{100 * after.low:.2f}, {100 * after.high:.2f}] n=20 |" in shown
    difference = shown[shown.index("+30.00 [") :].splitlines()[0]
    low, high = (float(end) for end in difference[difference.index("[") + 1 : difference.index("]")].split(","))
    assert 0 < low < 30 < high < 60
    assert difference.rstrip(" |").endswith(f"n=20 p={sign_test(6, 0):.2g}")  # six questions better, none worse


def test_its_mistakes_are_one_line(command, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        command(["toy", "--right", "many", "--output", str(tmp_path / "a.json")])
    assert "expected int, got many" in capsys.readouterr().err
