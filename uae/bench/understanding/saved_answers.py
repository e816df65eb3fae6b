"""Answers to questions about images as evaluation programs save them: lmms-eval's samples, VLMEvalKit's tables."""

from __future__ import annotations

import ast
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LETTERS = "ABCDEFGHI"
KEYS, TRUTHS, ANSWERS = ("index", "id", "question_id", "doc_id"), ("answer", "target"), ("prediction", "filtered_resps", "resps")
SUBTASKS, GROUPS = ("category", "subtask", "subdomain"), ("l2-category", "l2_category", "meta_task")
_OPTION = re.compile(r"^\s*\(?([A-I])[.:)]\s*(.*)$", re.MULTILINE)
_EMPTY = {"", "nan"}
SHOWN = 5


@dataclass(frozen=True)
class Answered:
    """One question, and what a model said.

    Args:
        key: Its index or id in the benchmark.
        said: The model's words.
        truths: The right letter, or the right answers of an open question.
        options: Letter to text; empty for an open question.
        subtask: The finest category.
        group: The category above it.
        question: Its words, or the whole prompt.
    """

    key: str
    said: str
    truths: tuple[str, ...]
    options: Mapping[str, str] = field(default_factory=dict)
    subtask: str = ""
    group: str = ""
    question: str = ""


def read_answers(files: Sequence[str | Path], questions: str | Path | None = None) -> tuple[list[Answered], str]:
    """All answers of some files, and the program that saved them.

    Args:
        files: ``.jsonl`` (a sample per line), ``.json`` (a list), ``.tsv`` or ``.csv``.
        questions: The benchmark's own questions in the same formats: supplies what lmms-eval's samples lack, by
            ``doc_id``, which is the number of the row.

    Raises:
        FileNotFoundError: A file is not there.
        ValueError: Rows are broken (each named), or a question has two answers.
    """
    asked = [row for _, row in read_rows(questions)] if questions else None
    answers, bad, program = [], [], "VLMEvalKit"
    for file in files:
        for where, row in read_rows(file):
            program = "lmms-eval" if "filtered_resps" in row else program
            try:
                answers.append(_answered(_joined(row, asked)))
            except ValueError as error:
                bad.append(f"{Path(file).name} {where}: {error}")
    times = Counter(one.key for one in answers)
    bad += [f"question {key!r} is answered twice" for key, count in times.items() if count > 1]
    if bad or not answers:
        more = f" and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        raise ValueError(f"--predictions: {'; '.join(bad[:SHOWN]) or 'no row in ' + ', '.join(map(str, files))}{more}")
    return answers, program


def read_rows(file: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each row stands, and the row; names of columns in lower case, but for the options' letters.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is of another format, or broken.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(file)!r} of saved answers; correct the option")
    kinds = {".jsonl": _lines, ".json": _list, ".tsv": _table, ".csv": _table}
    if path.suffix not in kinds:
        raise ValueError(f"{path.name}: saved answers are .jsonl, .json, .tsv or .csv; save a spreadsheet as .tsv")
    for where, row in kinds[path.suffix](path):
        if not isinstance(row, dict):
            raise ValueError(f"{path.name} {where} is no row of named values")
        yield where, {name if name in LETTERS else str(name).lower(): value for name, value in row.items()}


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                raise ValueError(f"{path.name} line {number} is no JSON; delete it, or save the answers again") from None
            yield f"line {number}", row


def _list(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is no JSON ({error})") from None
    if not isinstance(rows, list):
        raise ValueError(f"{path.name} is no list of rows; save it by DataFrame.to_json(orient='records')")
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _table(path: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # images stand in the tables
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), start=1):
            if None in row or None in row.values():
                raise ValueError(f"{path.name} row {number} has not as many columns as the first line")
            yield f"row {number}", row


def _joined(row: dict[str, Any], asked: Sequence[Mapping[str, Any]] | None) -> dict[str, Any]:
    """A row with what its samples nest (lmms-eval puts a question's data beside its metrics), and with its question's row."""
    nested = [value for name, value in row.items() if isinstance(value, dict) and (name == "doc" or "answer" in value)]
    flat = dict(row)
    for inner in nested:
        flat |= {name if name in LETTERS else name.lower(): value for name, value in inner.items()}
    if asked is None or "doc_id" not in row:
        return flat
    number = int(row["doc_id"])
    if not 0 <= number < len(asked):
        raise ValueError(f"doc_id {number}, but --questions has {len(asked)} rows; give the split that was answered")
    question = asked[number]
    truth, text = _first(flat, TRUTHS), _first(question, ("question",))
    if truth != _first(question, TRUTHS) or ("input" in row and text not in str(row["input"])):
        raise ValueError(f"is of another question than row {number + 1} of --questions; give the answered split in its order")
    return {**flat, **question}


def _answered(row: Mapping[str, Any]) -> Answered:
    key, truth = _first(row, KEYS), _first(row, TRUTHS)
    if not key:
        raise ValueError(f"has none of {', '.join(KEYS)}")
    if not truth:
        raise ValueError("has no answer to compare with (those of test splits are hidden: only the benchmark's server can tell)")
    if not any(name in row for name in ANSWERS):
        raise ValueError(f"has none of {', '.join(ANSWERS)}")
    said = next(row[name] for name in ANSWERS if name in row)
    while isinstance(said, list):
        said = said[0] if said else ""
    options = {} if _first(row, ("question_type",)) == "open" else _options(row) or _letters(truth)
    truths = (truth,) if options else _several(truth)
    if options and truth not in options:
        raise ValueError(f"has the answer {truth!r}, which is none of its options ({', '.join(options)})")
    return Answered(
        key, "" if said is None else str(said), truths, options, _subtask(row), _first(row, GROUPS), _first(row, ("question", "input"))
    )


def _subtask(row: Mapping[str, Any]) -> str:
    """The category; of MMMU also out of an id such as validation_Art_Theory_3."""
    match = re.fullmatch(r"(?:dev|validation|test)_(\w+)_\d+", _first(row, KEYS))
    return _first(row, SUBTASKS) or (match.group(1) if match else "")


def _options(row: Mapping[str, Any]) -> dict[str, str]:
    """Letter to text: from columns, from a list, or from the lines of the prompt."""
    columns = {letter: _first(row, (letter,)) for letter in LETTERS}
    if any(columns.values()):
        return {letter: text for letter, text in columns.items() if text}
    if "options" in row:
        listed = row["options"]
        if isinstance(listed, str):
            listed = _literal(listed)
        if isinstance(listed, list) and listed:
            return {letter: str(text) for letter, text in zip(LETTERS, listed, strict=False)}
    found = dict(_OPTION.findall(str(row.get("input", ""))))
    return {letter: text.strip() for letter, text in sorted(found.items())} if len(found) > 1 else {}


def _letters(truth: str) -> dict[str, str]:
    """Options of which only the letters are known: A to D, or to the right one."""
    last = max("D", truth) if truth in LETTERS else ""
    return {letter: "" for letter in LETTERS if letter <= last}


def _several(truth: str) -> tuple[str, ...]:
    listed = _literal(truth) if truth.startswith("[") else None
    return tuple(map(str, listed)) if isinstance(listed, list) and listed else (truth,)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None


def _first(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The first of some columns that holds anything, as text."""
    values = (str(row[name]).strip() for name in names if row.get(name) is not None)
    return next((value for value in values if value.lower() not in _EMPTY), "")
