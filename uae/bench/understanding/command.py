"""MMMU and MMT-Bench from lmms-eval's samples: overall, per meta-task and per subtask, with intervals.

python -m uae.bench understanding --benchmark mmt --predictions FILE ... --output result.json [--subtasks REGEX]
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uae.bench.arguments import listed, run
from uae.bench.fingerprints import sha256
from uae.bench.result import Case, check_output, summarize, write_result
from uae.bench.score_table import score_table
from uae.bench.understanding.samples import Benchmark, ScoredQuestion, read_samples

TITLES: dict[Benchmark, str] = {"mmmu": "MMMU", "mmt": "MMT-Bench"}
SELECTED = "selected subtasks"


def score_samples(
    benchmark: Benchmark,
    predictions: list[str],
    output: str,
    questions: str | None = None,
    subtasks: str | None = None,
    variant: str | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Sum up what lmms-eval scored for each question, per subtask and with 95 % intervals.

    Args:
        benchmark: mmmu or mmt (MMT-Bench, whose subtasks belong to meta-tasks).
        predictions: Samples files of lmms-eval, ``*_samples_*.jsonl``, written with ``--log_samples``.
        output: Result file, ending in .json.
        questions: JSON Lines of the benchmark's questions in the order of doc_id; needed for mmt, whose samples lack the subtask.
        subtasks: Regular expression; only subtasks whose name it finds (case aside) are shown and summed up.
        variant: Split and version, as "val" or "val_mi"; it becomes part of the result's name.
        system: Name of the model; the default is the name of the first file.
    """
    check_output(output)
    asked = read_samples(benchmark, predictions, questions)
    selected = select(asked, subtasks) if subtasks else {}
    names = [Path(file).name for file in predictions]
    files = predictions if len(set(names)) < len(names) else names  # files of one name in several folders are told apart
    cases = scored_cases(asked, selected)
    result = write_result(
        output,
        TITLES[benchmark] + (f" ({variant})" if variant else "") + " [lmms-eval]",
        system or Path(predictions[0]).stem,
        summarize(cases),
        {"harness": "lmms-eval"},
        {"questions": fingerprint(asked), **dict(zip(files, map(sha256, predictions), strict=True))},
        cases,
        subtasks={"pattern": subtasks, "matched": selected} if selected else None,
    )
    print(subtask_table(result))
    return result


def select(questions: Sequence[ScoredQuestion], pattern: str) -> dict[str, int]:
    """Subtasks whose name the pattern finds (case aside), and the number of questions of each.

    Raises:
        ValueError: The pattern is not a regular expression, or it finds no subtask.
    """
    counts = Counter(question.subtask for question in questions)
    try:
        found = {name: n for name, n in sorted(counts.items()) if re.search(pattern, name, re.IGNORECASE)}
    except re.error as error:
        raise ValueError(f"--subtasks {pattern!r} is no regular expression: {error}") from None
    if not found:
        raise ValueError(f"--subtasks {pattern!r} finds none of {len(counts)} subtasks: {', '.join(sorted(counts)[:8])}, ...")
    return found


def scored_cases(questions: Sequence[ScoredQuestion], selected: dict[str, int]) -> dict[str, list[Case]]:
    """Name of each score to its cases: all questions, the selected subtasks, the meta-tasks, the subtasks.

    A meta-task is the mean of its subtasks (MMT-Bench's own rule), every other score the mean of its questions.
    """
    cases = {"overall": [Case(question.name, question.score) for question in questions]}
    if selected:
        cases[SELECTED] = [Case(question.name, question.score) for question in questions if question.subtask in selected]
    for question in sorted(questions, key=lambda question: question.group):
        if question.group:
            case = Case(question.name, question.score, group=question.subtask)
            cases.setdefault(f"meta-task {question.group}", []).append(case)
    for question in sorted(questions, key=lambda question: question.subtask):
        cases.setdefault(question.subtask, []).append(Case(question.name, question.score))
    return cases


def fingerprint(questions: Sequence[ScoredQuestion]) -> str:
    """Digest of the questions as they were asked, whatever the answers: results with equal ones can be compared."""
    lines = sorted(repr((question.name, question.prompt, question.target)) for question in questions)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def subtask_table(result: dict[str, Any]) -> str:
    """The printed table: all scores, or only those of the selected subtasks."""
    if result["subtasks"] is None:
        return score_table(result)
    matched = result["subtasks"]["matched"]
    shown = {name: result["scores"][name] for name in ("overall", SELECTED, *matched)}
    found = ", ".join(f"{name} (n = {n})" for name, n in matched.items())
    return f"{score_table({**result, 'scores': shown})}\n\n{len(matched)} subtasks match {result['subtasks']['pattern']!r}: {found}"


def main(args: Sequence[str]) -> None:
    """Run the command with the words behind its name."""
    run("understanding", score_samples, listed(args, "--predictions"))
