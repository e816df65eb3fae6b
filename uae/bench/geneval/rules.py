"""GenEval's rules: what detections must be there for an image to be correct (Ghosh et al., arXiv 2310.11513).

Nothing here looks at pixels, so detections of any detector, or from a file, are judged anywhere. Published peculiarities
are kept, since they are the benchmark: more objects than asked for are only wrong in counting prompts, colors are those of
the surest detections, and a diagonal neighbor is both beside and above.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
THRESHOLD = 0.3  # a detection counts above this score, and in counting prompts ...
COUNTING_THRESHOLD = 0.9  # ... above this one
MOST = 16  # detections of a class that are looked at
POSITION_SLACK = 0.1  # of both objects' sizes: offsets within it are none
DIRECTION = 0.5  # least share of the distance between centers that makes a direction


@dataclass(frozen=True)
class Detection:
    """One object.

    Args:
        box: left, top, right, bottom in pixels; y points down.
        score: The detector's, in [0, 1].
        color: One of `COLORS`; None where nobody looked.
    """

    box: tuple[float, float, float, float]
    score: float
    color: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Whether an image is correct, and what is wrong with it."""

    correct: bool
    reasons: tuple[str, ...] = ()


def highest_scoring(scores: Sequence[float], tag: str) -> list[int]:
    """Places of the detections of one class that count, best first; the later of two equals goes first.

    Scores are compared as float32, as detectors give them: a score that rounds to the threshold is not above it. The
    original's sort leaves the order of equals to the processor it runs on.
    """
    score_N = np.asarray(scores, dtype=np.float32)
    order_N = np.argsort(score_N, kind="stable")[::-1]
    least = np.float32(COUNTING_THRESHOLD if tag == "counting" else THRESHOLD)
    return [int(place) for place in order_N if score_N[place] > least][:MOST]


def counted_detections(found: Mapping[str, Sequence[Detection]], tag: str) -> dict[str, list[Detection]]:
    """Class to the detections that count in a prompt of that tag, best first."""
    return {name: [some[i] for i in highest_scoring([one.score for one in some], tag)] for name, some in found.items()}


def relations(box: Sequence[float], other: Sequence[float]) -> set[str]:
    """Where the first box is, seen from the second: none, one or two of `RELATIONS`."""
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
    """Whether detections show what a prompt asks for.

    Args:
        metadata: A line of the prompt file: ``tag``, ``include`` (all must hold) and ``exclude`` (none may).
        found: Class to detections, in any order, also those that do not count.

    Raises:
        ValueError: A color matters that nobody has looked at.
    """
    there = counted_detections(found, metadata["tag"])
    reasons: list[str] = []
    groups: list[list[Detection] | None] = []  # per clause; None where it does not hold
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
    """Class to the places of detections whose color matters to a prompt, from the scores of all detections."""
    places: dict[str, list[int]] = {}
    for clause in metadata.get("include", ()):
        kept = highest_scoring(found.get(clause["class"], ()), metadata["tag"])[: clause["count"]]
        if "color" in clause and len(kept) == clause["count"]:
            places[clause["class"]] = max(places.get(clause["class"], []), kept, key=len)
    return places


def _problem(clause: Mapping[str, Any], group: list[Detection], groups: list[list[Detection] | None]) -> str | None:
    """Why a clause does not hold, or None."""
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
