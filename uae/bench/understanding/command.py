"""MMBench, MMMU and MMT-Bench from saved answers: overall, per ability and per subtask, with intervals and chance beside them.

python -m uae.bench understanding --benchmark mmt --predictions FILE ... --output result.json [--subtasks REGEX]
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from uae.bench.arguments import listed, run
from uae.bench.fingerprints import sha256
from uae.bench.result import Score, check_output, score, write_result
from uae.bench.score_table import score_table
from uae.bench.understanding.answer_parsing import choice, open_answer
from uae.bench.understanding.saved_answers import Answered, read_answers
from uae.metrics.intervals import mean_of_means, wilson

Name = Literal["mmbench", "mmmu", "mmt"]
TITLES = {"mmbench": "MMBench", "mmmu": "MMMU", "mmt": "MMT-Bench"}
GROUPS = {"mmbench": "ability", "mmmu": "domain", "mmt": "meta-task"}
ROTATION = 10**6  # rows of MMBench whose index is equal modulo this are one question with its options rotated


@dataclass(frozen=True)
class Case:
    """What counts once: a question, with all its rotations.

    Args:
        key: Of the question.
        subtask, group: As in `Answered`.
        answers: Its rows, the original order of options first.
        choices: The letters that were understood, None where there is none; of open questions the words.
        right: Of each row.
        complete: No rotation is missing.
    """

    key: str
    subtask: str
    group: str
    answers: tuple[Answered, ...]
    choices: tuple[str | None, ...]
    right: tuple[bool, ...]
    complete: bool = True

    @property
    def correct(self) -> bool:
        """All rows are right, and there."""
        return all(self.right) and self.complete


def score_answers(
    benchmark: Name,
    predictions: list[str],
    output: str,
    questions: str | None = None,
    subtasks: str | None = None,
    variant: str | None = None,
    harness: str | None = None,
    system: str | None = None,
) -> dict[str, Any]:
    """Score saved answers to a benchmark of multiple-choice questions.

    Args:
        benchmark: mmbench counts a question if it is right in all rotations; mmmu has open questions, too; mmt has
            subtasks in meta-tasks.
        predictions: Samples of lmms-eval (.jsonl), or tables with index, answer, prediction, category (.tsv, .csv, .json).
        output: The result, a JSON file.
        questions: The questions, as rows in the order of doc_id, where the samples do not tell their subtask (MMT-Bench).
        subtasks: Regular expression: show and sum up only the subtasks it finds.
        variant: Split and version, as "dev_en_v11" or "val_mi": becomes part of the result's name.
        harness: Program that asked the questions; the default is told by the format. Prompts differ, so results of
            different harnesses are not compared.
        system: Name of the model; the default is that of the first file.
    """
    check_output(output)
    answers, program = read_answers(predictions, questions)
    cases = gather(answers, benchmark)
    if benchmark == "mmt" and not all(case.subtask for case in cases):
        raise ValueError("the samples do not tell their subtask; give the benchmark's rows by --questions")
    chosen = select(cases, subtasks) if subtasks else None
    scores = summarize(cases, benchmark, chosen)
    reading = f" [{harness or program}]"
    result = write_result(
        output,
        TITLES[benchmark] + (f" ({variant})" if variant else "") + reading,
        system or Path(predictions[0]).stem,
        scores,
        {"harness": harness or program, "parsing": "letters by MMMU's rules, never at random"},
        {"questions": fingerprint(answers), **{Path(file).name: sha256(file) for file in predictions}},
        subtasks={"pattern": subtasks, "matched": chosen} if chosen else None,
        unparsed=sum(found is None for case in cases for found in case.choices),
        rows=len(answers),
        incomplete=[case.key for case in cases if not case.complete],
        chance=chance(cases, benchmark, chosen),
        per_case=[_row(case) for case in cases],
    )
    print(table(result, chosen))
    return result


def gather(answers: Sequence[Answered], benchmark: Name) -> list[Case]:
    """Rows to questions. Rotations are told apart by their index, see `ROTATION`.

    Raises:
        ValueError: An index of MMBench is no number.
    """
    if benchmark != "mmbench":
        return [_case([answer]) for answer in answers]
    rotations: dict[int, list[tuple[int, Answered]]] = {}
    for answer in answers:
        try:
            index = int(float(answer.key))
        except ValueError:
            raise ValueError(f"the index {answer.key!r} of MMBench is no number, so rotations cannot be found") from None
        rotations.setdefault(index % ROTATION, []).append((index, answer))
    rows = [[answer for _, answer in sorted(some, key=lambda pair: pair[0])] for some in rotations.values()]
    if all(len(some) == 1 for some in rows):
        raise ValueError("the rotations are not there (rows with an index of a million and more); without them it is not MMBench")
    return [_case(some, rotated=True) for some in rows]


def _case(rows: Sequence[Answered], rotated: bool = False) -> Case:
    choices, right = zip(*(_verdict(row) for row in rows), strict=True)
    key = str(int(float(rows[0].key)) % ROTATION) if rotated else rows[0].key
    complete = not rotated or len(rows) >= len(rows[0].options)
    return Case(key, rows[0].subtask, rows[0].group, tuple(rows), choices, right, complete)


def _verdict(row: Answered) -> tuple[str | None, bool]:
    if row.options:
        letter = choice(row.said, row.options)
        return letter, letter in row.truths
    return row.said.strip() or None, open_answer(row.said, row.truths)


def select(cases: Sequence[Case], pattern: str) -> dict[str, int]:
    """Subtasks whose name holds the pattern (case aside), and how many questions each has.

    Raises:
        ValueError: There is none, or the pattern is none.
    """
    counts = Counter(case.subtask for case in cases)
    try:
        found = {name: n for name, n in sorted(counts.items()) if name and re.search(pattern, name, re.IGNORECASE)}
    except re.error as error:
        raise ValueError(f"--subtasks {pattern!r} is no regular expression: {error}") from None
    if not found:
        raise ValueError(f"--subtasks {pattern!r} finds none of {len(counts)} subtasks: {', '.join(sorted(counts)[:8])}, ...")
    return found


def summarize(cases: Sequence[Case], benchmark: Name, chosen: dict[str, int] | None = None) -> dict[str, Score]:
    """Overall, the selection, groups and subtasks. Meta-tasks of MMT-Bench are means of their subtasks, all else of questions."""
    scores = {"overall": _share(cases)}
    if benchmark == "mmbench":
        first = [bool(case.right[0]) for case in cases]
        scores["vanilla"] = score(wilson(sum(first), len(first)), len(first))
    if chosen:
        scores["selected subtasks"] = _share([case for case in cases if case.subtask in chosen])
    for group, some in _by(cases, lambda case: case.group).items():
        parts = [np.array([case.correct for case in one]) for one in _by(some, lambda case: case.subtask).values()]
        macro = benchmark == "mmt" and len(parts) > 1
        mean = score(mean_of_means([(part, np.arange(len(part))) for part in parts]), len(some)) if macro else _share(some)
        scores[f"{GROUPS[benchmark]} {group}"] = mean
    return scores | {subtask: _share(some) for subtask, some in _by(cases, lambda case: case.subtask).items()}


def _share(cases: Sequence[Case]) -> Score:
    return score(wilson(sum(case.correct for case in cases), len(cases)), len(cases))


def _by(cases: Sequence[Case], name: Callable[[Case], str]) -> dict[str, list[Case]]:
    groups: dict[str, list[Case]] = {}
    for case in sorted(cases, key=name):
        if name(case):
            groups.setdefault(name(case), []).append(case)
    return groups


def chance(cases: Sequence[Case], benchmark: Name, chosen: dict[str, int] | None) -> dict[str, dict[str, float]]:
    """What answers without looking score: a random letter, and always the letter that is right most often.

    Under CircularEval a question counts if all rotations are right. Open questions count as wrong.
    """
    letters = Counter(row.truths[0] for case in cases for row in case.answers if row.options)
    frequent = letters.most_common(1)[0][0] if letters else ""
    subsets = _by(cases, lambda case: case.subtask)
    if chosen:
        subsets["selected subtasks"] = [case for case in cases if case.subtask in chosen]
    return {
        name: {
            "random": float(np.mean([np.prod([1 / len(row.options) if row.options else 0 for row in case.answers]) for case in some])),
            "frequent": float(np.mean([all(row.options and row.truths[0] == frequent for row in case.answers) for case in some])),
        }
        for name, some in {"overall": list(cases), **subsets}.items()
    }


def fingerprint(answers: Sequence[Answered]) -> str:
    """Of the questions, whatever was answered: results of equal ones can be compared."""
    lines = sorted(repr((one.key, one.question, sorted(one.options.items()), one.truths)) for one in answers)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _row(case: Case) -> dict[str, Any]:
    said = [found if row.options else None for found, row in zip(case.choices, case.answers, strict=True)]
    right = {"vanilla": int(case.right[0])} if len(case.right) > 1 else {}
    return {"key": case.key, "subtask": case.subtask, "group": case.group, "correct": int(case.correct), **right, "choices": said}


def table(result: dict[str, Any], chosen: dict[str, int] | None = None) -> str:
    """What is printed: all scores, or those of the selected subtasks; chance beside them."""
    names = ["overall", "selected subtasks", *chosen] if chosen else list(result["scores"])
    lines = [score_table({**result, "scores": {name: result["scores"][name] for name in names}}), ""]
    for name in names:
        if name in result["chance"] and (chosen or name == "overall"):
            blind = result["chance"][name]
            lines.append(f"chance, {name}: {100 * blind['random']:.1f} random, {100 * blind['frequent']:.1f} most frequent letter")
    if chosen:
        found = ", ".join(f"{name} (n = {n})" for name, n in chosen.items())
        lines.append(f"{len(chosen)} subtasks match {result['subtasks']['pattern']!r}: {found}")
    lines.append(f"{result['unparsed']} of {result['rows']} answers name no option: wrong")
    if incomplete := result["incomplete"]:
        some = ", ".join(incomplete[:5]) + ", ..." * (len(incomplete) > 5)
        lines.append(f"{len(incomplete)} questions lack rotations: wrong ({some})")
    return "\n".join(lines)


def main(args: Sequence[str]) -> None:
    """The command."""
    run("understanding", score_answers, listed(args, "--predictions"))
