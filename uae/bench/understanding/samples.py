"""Scores per question, as lmms-eval writes them with ``--log_samples``: one JSON object per line of ``*_samples_TASK.jsonl``.

Every line has ``doc_id`` (number of the question in its split), ``input`` (the prompt), ``target`` (the right answer) and, for
each metric of the task, a key with what the task's aggregation reads. These shapes are those of lmms-eval 0.7.2.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from uae.files.lines import read_lines

Benchmark = Literal["mmmu", "mmt"]
SHOWN = 5  # broken lines that an error names


@dataclass(frozen=True)
class ScoredQuestion:
    """One question with the score of the model's answer.

    Args:
        name: Id of the question, unique in the benchmark.
        score: 1 if lmms-eval takes the answer for right, else 0.
        subtask: Finest category of the question (a subject of MMMU, a subtask of MMT-Bench).
        group: Category above it (a meta-task of MMT-Bench); empty where there is none.
        prompt: What the model was asked.
        target: The right answer.
    """

    name: str
    score: float
    subtask: str
    group: str
    prompt: str
    target: str


def read_samples(benchmark: Benchmark, files: Sequence[str | Path], questions: str | Path | None) -> list[ScoredQuestion]:
    """All questions of some samples files.

    Args:
        benchmark: Which benchmark's metrics the files hold.
        files: Samples files of lmms-eval; together they are one benchmark.
        questions: JSON Lines of the benchmark's own questions in the order of ``doc_id``. They supply the subtask, which the samples
            of MMT-Bench do not hold.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: Lines are broken (the first ones are named), or a question was answered twice.
    """
    rows = [row for _, row in _lines(questions, "--questions")] if questions else None
    read = READERS[benchmark]
    found, broken = [], []
    for file in files:
        for place, sample in _lines(file, "--predictions"):
            try:
                found.append(read(sample, rows))
            except (KeyError, TypeError, AttributeError) as error:
                broken.append(f"{place} lacks what lmms-eval writes for {benchmark} ({type(error).__name__} {error})")
            except ValueError as error:
                broken.append(f"{place} {error}")
    times = Counter(question.name for question in found)
    broken += [f"question {name!r} is answered twice" for name, count in times.items() if count > 1]
    if broken or not found:
        more = f" and {len(broken) - SHOWN} more" if len(broken) > SHOWN else ""
        raise ValueError(f"--predictions: {'; '.join(broken[:SHOWN]) or 'no line in ' + ', '.join(map(str, files))}{more}")
    return found


def _mmmu(sample: Mapping[str, Any], _: Sequence[Mapping[str, Any]] | None) -> ScoredQuestion:
    """``mmmu_acc`` holds the answer as lmms-eval understood it; its aggregation only compares it with the right one."""
    metric = sample["mmmu_acc"]
    right = any(_equal(metric["answer"], answer) for answer in metric["parsed_pred"])
    return ScoredQuestion(metric["id"], float(right), metric["subdomain"], "", sample["input"], sample["target"])


def _mmt(sample: Mapping[str, Any], rows: Sequence[Mapping[str, Any]] | None) -> ScoredQuestion:
    """``accuracy`` holds the score twice: as ``overall`` and under the name of the meta-task."""
    metric, number = sample["accuracy"], sample["doc_id"]
    group = next(name for name in metric if name != "overall")
    if rows is None:
        raise ValueError("does not name its subtask: give the questions of the split by --questions")
    if number >= len(rows) or rows[number]["question"].strip() not in sample["input"] or rows[number]["answer"] != sample["target"]:
        raise ValueError(f"is not question {number} of --questions: give the questions of the same split, in their order")
    return ScoredQuestion(str(number), metric["overall"], rows[number]["category"], group, sample["input"], sample["target"])


Reader = Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]] | None], ScoredQuestion]
READERS: dict[Benchmark, Reader] = {"mmmu": _mmmu, "mmt": _mmt}


def _equal(right: str, answer: str) -> bool:
    """Whether two answers are the same letter, word (case aside) or number (to two decimals)."""
    try:
        return round(float(right.replace(",", "")), 2) == round(float(answer.replace(",", "")), 2)
    except ValueError:
        return right.strip().lower() == answer.strip().lower()


def _lines(file: str | Path, option: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line of a JSON Lines file, with its place as an error names it."""
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"{option} {str(file)!r} does not exist; give a .jsonl file")
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            place = f"{path.name} line {number}"
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{option}: {place} is not a JSON object; give a JSON Lines file (lmms-eval's *_samples_*.jsonl)")
            yield place, row
