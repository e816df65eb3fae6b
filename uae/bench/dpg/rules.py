"""DPG-Bench's rules: the score of an image from the answers to questions about it (Hu et al., ELLA, arXiv 2403.05135).

A question may depend on others: whether the cat is red means nothing without a cat. There are two modes:

* ``official`` does what the published script does, defects included: its first row of questions is skipped (so an item whose
  first question others depend on is dropped), dependencies are followed in the order of the file (a child listed before
  its parent is not zeroed), and categories count only the last tile of a grid.
* ``fixed`` uses every row, follows dependencies from parents to children, and counts every tile.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Literal

Mode = Literal["official", "fixed"]
COLUMNS = ("item_id", "proposition_id", "dependency", "tuple", "question_natural_language")
FETCH = "git clone --depth 1 https://github.com/TencentQQGYLab/ELLA  # dpg_bench/dpg_bench.csv and dpg_bench/prompts, Apache-2.0"


@dataclass(frozen=True)
class YesNoQuestion:
    """One question about an image, answered by yes or no.

    Args:
        text: Words of the question.
        parents: Numbers of the questions that this one depends on.
        category: Category of the question, as "attribute - color"; the broad category is the part before the dash.
    """

    text: str
    parents: tuple[int, ...]
    category: str

    @property
    def broad(self) -> str:
        """The broad category."""
        return self.category.split("-")[0].strip()


Item = dict[int, YesNoQuestion]  # number to question, in the order of the file


@dataclass
class DPGScores:
    """Scores of items and answers by category.

    Args:
        items: Item to its score, in [0, 1].
        categories: Category to pairs (item, answer in {0, 1}) of all answers that the mode counts.
        dropped: Item without a score of its own to the reason.
    """

    items: dict[str, float] = field(default_factory=dict)
    categories: dict[str, list[tuple[str, float]]] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)


def read_questions(path: str | Path, mode: Mode) -> dict[str, Item]:
    """Item to its questions.

    Raises:
        FileNotFoundError: The file does not exist; the message says where to get the published one.
        ValueError: Columns are missing or a row cannot be read. In the fixed mode also: a number occurs twice, a parent does not
            exist, or questions depend on each other in a circle.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no questions at {str(path)!r}; get them by: {FETCH}")
    with Path(path).open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{str(path)!r} has no column {', '.join(sorted(missing))}; correct --csv")
        rows = list(reader)
    items: dict[str, Item] = {}
    before = None
    for line, row in enumerate(rows[1:] if mode == "official" else rows, start=3 if mode == "official" else 2):
        name, number, question = _question(row, line, path)
        if mode == "official" and name != before:
            items[name] = {}  # as in the script, this forgets the questions of an earlier block of the item
        before, item = name, items.setdefault(name, {})
        if mode == "fixed" and number in item:
            raise ValueError(f"row {line} of {str(path)!r}: question {number} of {name} is there twice; correct --csv")
        item[number] = question
    if mode == "fixed":
        for name, item in items.items():
            _order(name, item)
    return items


def score_tile(name: str, item: Item, answers: Mapping[int, bool], mode: Mode) -> float:
    """The share of questions that are answered by yes; a question with a parent that is answered by no counts as no.

    Args:
        name: Name of the item, for the error.
        item: Questions of the item.
        answers: Number of each question to whether the answer is yes.
        mode: Which rules.

    Raises:
        KeyError: A parent is not among the questions, in the official mode.
    """
    worth = {number: float(answers[number]) for number in item}
    for number in item if mode == "official" else _order(name, item):
        if any(worth[parent] == 0 for parent in item[number].parents):
            worth[number] = 0.0
    return sum(worth.values()) / len(worth)


def score_items(questions: Mapping[str, Item], answers: Mapping[str, Sequence[Mapping[int, bool]]], mode: Mode) -> DPGScores:
    """Score items and categories.

    Args:
        questions: Item to its questions, see `read_questions`.
        answers: Item to the answers about each tile (number of the question to whether the answer is yes). The official mode
            leaves out items without answers, the fixed mode counts them as 0.
        mode: Which rules.
    """
    scores = DPGScores()
    for name, tiles in answers.items():
        item = questions.get(name)
        if item is None:
            scores.dropped[name] = "it has no questions"
            continue
        try:
            scores.items[name] = sum(score_tile(name, item, tile, mode) for tile in tiles) / len(tiles)
        except KeyError as parent:
            scores.dropped[name] = f"question {parent} is skipped, and others depend on it"
            continue
        for tile in tiles[-1:] if mode == "official" else tiles:
            for number, question in item.items():
                scores.categories.setdefault(question.category, []).append((name, float(tile[number])))
    for name in questions.keys() - answers.keys():
        scores.dropped[name] = "it has no image, or no answers"
        if mode == "fixed":
            scores.items[name] = 0.0
    return scores


def _question(row: Mapping[str, str], line: int, path: str | Path) -> tuple[str, int, YesNoQuestion]:
    try:
        parents = tuple(number for part in row["dependency"].split(",") if (number := int(part)) != 0)
        category = row["tuple"].split("(")[0].strip()
        return row["item_id"], int(row["proposition_id"]), YesNoQuestion(row["question_natural_language"], parents, category)
    except (ValueError, AttributeError) as error:
        raise ValueError(f"row {line} of {str(path)!r} is no question ({error}); correct --csv") from error


def _order(name: str, item: Item) -> list[int]:
    """The numbers of the questions, parents before children.

    Raises:
        ValueError: There is no such order, or a parent does not exist.
    """
    missing = sorted({parent for question in item.values() for parent in question.parents} - item.keys())
    if missing:
        raise ValueError(f"item {name} has no question {missing[0]}, but others depend on it; correct --csv")
    try:
        return list(TopologicalSorter({number: question.parents for number, question in item.items()}).static_order())
    except CycleError as error:
        raise ValueError(f"questions {error.args[1]} of item {name} depend on each other in a circle; correct --csv") from error
