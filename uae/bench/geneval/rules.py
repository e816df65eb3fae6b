"""GenEval's rules: which detections make an image correct (Ghosh et al., arXiv 2310.11513).

The rules read detections and no pixels, so they apply to the detections of any detector or file. The published rules are kept
with their peculiarities: more objects than asked for are wrong in counting prompts only, colors are compared for the
highest-scoring detections, and a diagonal neighbor is both beside and above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3  # a detection counts if its score is above this
COUNTING_THRESHOLD = 0.9  # the same in counting prompts
MOST = 16  # largest number of detections per class
POSITION_SLACK = 0.1  # offsets smaller than this share of both objects' sizes count as none
DIRECTION = 0.5  # an offset along an axis is a direction from this share of the distance between centers


@dataclass(frozen=True)
class Detection:
    """One detected object.

    Args:
        box: Left, top, right and bottom in pixels; y points down.
        score: Score of the detector, in [0, 1].
        color: One of `COLORS`; None if the color was not determined.
    """

    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an image is correct, and the reasons if it is not."""

    correct: bool
    reasons: tuple[str, ...] = ()


def highest_scoring(scores: Sequence[float], tag: str) -> list[int]:
    """Positions of the detections of one class that count, highest score first; of equal scores the later one comes first.

    Scores are compared as float32, the detectors' precision: a score that rounds to the threshold is not above it. The original's
    sort leaves the order of equal scores undefined.

    Args:
        scores: Scores of all detections of the class.
        tag: Tag of the prompt, one of `TAGS`.
    """
    score_N = np.asarray(scores, dtype=np.float32)
    order_N = np.argsort(score_N, kind="stable")[::-1]
    least = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    return [int(place) for place in order_N if score_N[place] > least][:MOST]


def counted_detections(found: Mapping[str, Sequence[Detection]], tag: str) -> dict[str, list[Detection]]:
    """Class to the detections that count in a prompt with a tag, highest score first."""
    return {name: [some[i] for i in highest_scoring([one.score for one in some], tag)] for name, some in found.items()}


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where the first box lies, seen from the second: none, one or two of `RELATIONS`."""
    corners = np.asarray([box, other], dtype=np.float32).reshape(2, 2, 2)  # box, corner, (x, y)
    centers, sizes = corners.mean(axis=1), np.abs(corners[:, 1] - corners[:, 0])
    offset = centers[0] - centers[1]
    slack = POSITION_SLACK * (sizes[0] + sizes[1])
    clear = np.maximum(np.abs(offset) - slack, 0) * np.sign(offset)
    if np.all(np.abs(clear) < 1e-3):
        return set()
    x, y = clear / np.linalg.norm(offset)
    held = {"left of": x < -DIRECTION, "right of": x > DIRECTION, "above": y < -DIRECTION, "below": y > DIRECTION}
    return {name for name, holds in held.items() if holds}


def judge(metadata: Mapping[str, Any], found: Mapping[str, Sequence[Detection]]) -> Verdict:
    """Decide whether detections show what a prompt asks for.

    Args:
        metadata: Line of the prompt file: ``tag``, ``include`` (all clauses must hold) and ``exclude`` (no clause may hold).
        found: Class to all its detections, in any order.

    Raises:
        ValueError: The prompt asks for a color that was not determined.
    """
    there = counted_detections(found, metadata["tag"])
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # detections of each clause; None for a clause that does not hold
    for clause in metadata.get("include", ()):
        group = there.get(clause["class"], [])[: clause["count"]]
        problem = _problem(clause, group, groups)
        groups.append(None if problem else group)
        if problem:
            reasons.append(problem)
    for clause in metadata.get("exclude", ()):
        number = len(there.get(clause["class"], []))
        if number >= clause["count"]:
            reasons.append(f"expected {clause['class']}<{clause['count']}, found {number}")
    return Verdict(not reasons, tuple(reasons))


def objects_needing_color(metadata: Mapping[str, Any], found: Mapping[str, Sequence[float]]) -> dict[str, list[int]]:
    """Class to the positions of the detections whose color a prompt asks for.

    Args:
        metadata: Line of the prompt file.
        found: Class to the scores of all its detections.
    """
    places: dict[str, list[int]] = {}
    for clause in metadata.get("include", ()):
        kept = highest_scoring(found.get(clause["class"], ()), metadata["tag"])[: clause["count"]]
        if "color" in clause and len(kept) == clause["count"]:
            places[clause["class"]] = max(places.get(clause["class"], []), kept, key=len)
    return places


def _problem(clause: Mapping[str, Any], group: list[Detection], groups: list[list[Detection] | None]) -> str | None:
    """The reason why a clause does not hold; None if it holds."""
    name, count = clause["class"], clause["count"]
    if len(group) < count:
        return f"expected {name}>={count}, found {len(group)}"
    if "color" in clause:
        colors = [one.color for one in group]
        if None in colors:
            raise ValueError(f"the detections say no color of {name}, which this prompt asks for: detect with its metadata")
        if colors.count(clause["color"]) < count:
            return f"expected {clause['color']} {name}>={count}, found {', '.join(map(str, colors)) or 'none'}"
    if "position" not in clause:
        return None
    relation, target = clause["position"]
    others = groups[target]
    if others is None:
        return f"no target for {name} to be {relation}"
    wrong = (seen for one in group for other in others if relation not in (seen := relations(one.box, other.box)))
    for seen in wrong:
        return f"expected {name} {relation} target, found {' and '.join(sorted(seen)) or 'neither side'}"
    return None
