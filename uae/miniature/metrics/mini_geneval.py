"""GenEval's six tasks in the language of the procedural scenes, scored strictly by the exact detector."""

from __future__ import annotations

import random

import torch

from uae.miniature.metrics.scenes import shows
from uae.miniature.scenes import Object, Scene, describe, detect, parse
from uae.miniature.scenes.captions import Detail
from uae.miniature.scenes.world import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES
from uae.types import UMM

TASKS: dict[str, tuple[tuple[int, ...], Detail]] = {
    "single": ((1,), Detail(size=False, position=False, background=False)),
    "two": ((2,), Detail(size=False, position=False, background=False)),
    "counting": ((2, 3), Detail(size=False, position=False, background=False)),
    "background": ((1, 2), Detail(size=False, position=False)),
    "position": ((1, 2), Detail(size=False, background=False)),
    "size": ((1, 2), Detail(position=False, background=False)),
}


def prompts(task: str, n: int, seed: int = 0) -> list[str]:
    """``n`` prompts of a task. Objects of a counting prompt are all alike."""
    rng = random.Random(f"{seed}/{task}")
    counts, detail = TASKS[task]
    written = []
    for _ in range(n):
        cells = rng.sample([(row, column) for row in ROWS for column in COLUMNS], rng.choice(counts))
        objects = [
            Object(row, column, rng.choice(list(COLORS)), rng.choice(SHAPES), rng.choice(list(SIZES)[1:])) for row, column in cells
        ]
        if task == "counting":
            objects = [Object(o.row, o.column, objects[0].color, objects[0].shape, o.size) for o in objects]
        written.append(describe(Scene(rng.choice(list(BACKGROUNDS)), tuple(objects)), detail))
    return written


@torch.no_grad()
def mini_geneval(umm: UMM, n: int = 64, seed: int = 0, tries: int = 1) -> dict[str, float]:
    """Share of prompts whose image shows what they say and nothing else, per task; ``overall`` is the tasks' mean.

    Args:
        umm: The system whose conditioner and renderer are tested; its captioner is not used.
        n: Number of prompts per task.
        seed: Random seed of the prompts.
        tries: Images per prompt, of which one has to be right. More than one is a selection by the truth.
    """
    scores = {}
    for task in TASKS:
        texts = [text for text in prompts(task, n, seed) for _ in range(tries)]
        images = umm.renderer.render(umm.conditioner.encode(texts), list(range(n * tries)))
        pairs = zip(detect(images), texts, strict=True)
        right = [(caption := parse(text)) is not None and shows(seen, caption) for seen, text in pairs]
        scores[task] = sum(any(right[first : first + tries]) for first in range(0, n * tries, tries)) / n
    return {**scores, "overall": sum(scores.values()) / len(scores)}
