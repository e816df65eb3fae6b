"""GenEval's prompt files: reading them, and recognising the published ones."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from uae.bench.geneval.rules import COLORS, RELATIONS, TAGS
from uae.files.lines import read_lines

FETCH = "curl -LO https://raw.githubusercontent.com/djghosh13/geneval/af4902f/prompts/evaluation_metadata.jsonl  # MIT licence"
PUBLISHED = {  # git blob (without white space at the end of the file) to the name of the benchmark
    "efc21c7e639cd45554a1e44fac87157211f16d51": "GenEval",
    "7d9f82584cdb7409fc7b240267d0ce6fa93570f1": "GenEval (rewritten)",  # BAGEL's long prompts, with scores that are points higher
}
OWN = "GenEval (own prompts)"

# COCO's 80 categories in the order of its annotations, three of them named as GenEval does (object_names.txt, MIT License,
# Copyright (c) 2023 Dhruba Ghosh). The classes of a detector are mapped by position, since its own names differ.
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip


def read_prompts(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a prompt file: ``tag``, ``include``, optionally ``exclude``, ``prompt``.

    Raises:
        FileNotFoundError: The file does not exist; the message says where to get the published one.
        ValueError: A line is not a prompt of GenEval.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompts at {str(path)!r}; get them by: {FETCH}")
    lines = [line for line in read_lines(path) if line.strip()]
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompts.append(json.loads(line))
            problem = _problem(prompts[-1])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{type(error).__name__} {error}"
        if problem:
            raise ValueError(f"line {number} of {str(path)!r} is no GenEval prompt ({problem}); correct --prompts")
    if not prompts:
        raise ValueError(f"{str(path)!r} holds no prompt; correct --prompts")
    return prompts


def variant(path: str | Path) -> str:
    """Name of the benchmark that a prompt file makes; scores of different prompt files are not comparable."""
    content = Path(path).read_bytes().rstrip() + b"\n"
    blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
    return PUBLISHED.get(blob, OWN)


def _problem(prompt: dict[str, Any]) -> str | None:
    """What is wrong with a prompt; None if nothing is."""
    if prompt["tag"] not in TAGS:
        return f"tag {prompt['tag']!r}; known: {', '.join(TAGS)}"
    if not (isinstance(prompt["prompt"], str) and prompt["prompt"].strip()):
        return "prompt is no text, or empty"
    for place, clause in enumerate([*prompt["include"], *prompt.get("exclude", ())]):
        if clause["class"] not in CLASSES:
            return f"class {clause['class']!r} is none of the detector's 80"
        if not (isinstance(clause["count"], int) and clause["count"] > 0):
            return f"count {clause['count']!r}"
        if clause.get("color", COLORS[0]) not in COLORS:
            return f"color {clause['color']!r}; known: {', '.join(COLORS)}"
        relation, target = clause.get("position", (RELATIONS[0], 0))
        if relation not in RELATIONS or not ("position" not in clause or 0 <= target < place):
            return f"position {clause['position']!r}: a relation ({', '.join(RELATIONS)}) and an earlier object's number"
    return None
