"""MMT-Bench's fine-grained questions in the language of the procedural scenes: which of four captions is true?

The miniature's captioner knows no letters, so it answers by likelihood: the option whose tokens it finds most probable on
average. Options are whole captions that differ in one attribute. They are drawn before it is decided which of them is true,
so nothing but the image tells: without it a quarter is right in expectation. An option's likelihood does not depend on its
letter, so all four rotations of a question get the same answer, and CircularEval equals the plain score.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from uae.metrics.intervals import Interval, wilson
from uae.miniature.scenes import Object, Scene, describe, render
from uae.miniature.scenes.world import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES, Split
from uae.types import Captioner, Rollout

LETTERS = 4
SMALL, LARGER = "tiny", tuple(size for size in SIZES if size != "tiny")
CELLS = [(row, column) for row in ROWS for column in COLUMNS]
Scorer = Callable[[Tensor, list[list[str]]], Tensor]  # images [B, 3, H, W] and 4 captions each, to scores [B, 4]


@dataclass(frozen=True)
class Question:
    """A question with four scenes as options, one of which is shown as an image.

    Args:
        scenes: The four options.
        answer: Index in ``scenes`` of the scene that is shown.
    """

    scenes: tuple[Scene, ...]
    answer: int

    @property
    def options(self) -> list[str]:
        """The captions to choose from."""
        return [describe(scene) for scene in self.scenes]


def questions(subtask: str, n: int, seed: int = 0, split: Split = "val") -> list[Question]:
    """``n`` questions of a subtask, about scenes of one split; each letter is right in exactly a quarter of them.

    Raises:
        ValueError: ``n`` cannot be divided by four.
    """
    if n < LETTERS or n % LETTERS:
        raise ValueError(f"n={n} questions: each of {LETTERS} letters is right equally often; give a multiple of {LETTERS}")
    rng = random.Random(f"{seed}/{subtask}")
    answers = [letter for letter in range(LETTERS) for _ in range(n // LETTERS)]
    rng.shuffle(answers)
    return [_question(SUBTASKS[subtask], answer, rng, split) for answer in answers]


def _question(make: Callable[[random.Random], list[Scene]], answer: int, rng: random.Random, split: Split) -> Question:
    while True:  # the split is a hash of the scene, so drawing again favours no option
        scenes = make(rng)
        rng.shuffle(scenes)
        if scenes[answer].split == split:
            return Question(tuple(scenes), answer)


def _scene(background: str, objects: Sequence[Object]) -> Scene:
    """Objects in reading order, as captions name them."""
    return Scene(background, tuple(sorted(objects, key=lambda one: CELLS.index((one.row or "", one.column or "")))))


def _objects(rng: random.Random, sizes: Sequence[str]) -> list[Object]:
    """Objects of given sizes in different cells."""
    cells = rng.sample(CELLS, len(sizes))
    return [Object(*cell, rng.choice(list(COLORS)), rng.choice(SHAPES), size) for cell, size in zip(cells, sizes, strict=True)]


def _background(rng: random.Random) -> str:
    return rng.choice(list(BACKGROUNDS))


def _changed(rng: random.Random, sizes: Sequence[str], attribute: str, values: Sequence[str]) -> list[Scene]:
    """Four scenes that differ in one attribute of the first object."""
    (first, *rest), background = _objects(rng, sizes), _background(rng)
    return [_scene(background, [replace(first, **{attribute: value}), *rest]) for value in rng.sample(list(values), LETTERS)]


def _moved(rng: random.Random, sizes: Sequence[str]) -> list[Scene]:
    """Four scenes that differ in the position of the first object."""
    (first, *rest), background = _objects(rng, sizes), _background(rng)
    free = [cell for cell in CELLS if cell not in {(one.row, one.column) for one in rest}]
    return [_scene(background, [replace(first, row=row, column=column), *rest]) for row, column in rng.sample(free, LETTERS)]


def _sizes(rng: random.Random) -> list[str]:
    """A small target, and one or two larger objects."""
    return [SMALL, *(rng.choice(LARGER) for _ in range(rng.choice((1, 2))))]


def _presence(rng: random.Random) -> list[Scene]:
    """Four scenes with a larger object and none, either one, or both of two small objects."""
    (large, first, second), background = _objects(rng, [rng.choice(LARGER), SMALL, SMALL]), _background(rng)
    return [_scene(background, [large, *some]) for some in ([], [first], [second], [first, second])]


def _count(rng: random.Random) -> list[Scene]:
    """Four scenes of the same three objects, of which none, one, two or three have the color that is counted."""
    objects, background = _objects(rng, [rng.choice(list(SIZES)) for _ in range(3)]), _background(rng)
    counted, other = rng.sample(list(COLORS), 2)
    return [
        _scene(background, [replace(one, color=counted if i < k else other) for i, one in enumerate(objects)]) for k in range(LETTERS)
    ]


def _backgrounds(rng: random.Random) -> list[Scene]:
    objects = _objects(rng, [rng.choice(list(SIZES)) for _ in range(rng.choice((1, 2, 3)))])
    return [_scene(background, objects) for background in BACKGROUNDS]


SUBTASKS: dict[str, Callable[[random.Random], list[Scene]]] = {
    "small_object_presence": _presence,
    "small_object_color": lambda rng: _changed(rng, _sizes(rng), "color", list(COLORS)),
    "small_object_shape": lambda rng: _changed(rng, _sizes(rng), "shape", SHAPES),
    "small_object_place": lambda rng: _moved(rng, _sizes(rng)),
    "counting": _count,
    "position": lambda rng: _moved(rng, [rng.choice(LARGER) for _ in range(rng.choice((1, 2, 3)))]),
    "background": _backgrounds,
}


def likelihood(captioner: Captioner) -> Scorer:
    """Mean log-prob of a caption's tokens and its end, given the image and the captioner's own instruction."""
    inner: Any = captioner
    tokenizer = inner.processor.tokenizer
    end = tokenizer.eos_token_id if tokenizer.eos_token_id in inner.end_ids else inner.end_ids[0]

    def scores(images_BCHW: Tensor, captions: list[list[str]]) -> Tensor:
        texts = [text for options in captions for text in options]
        rows = [[*ids, end] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        longest = max(map(len, rows))
        tokens_NT = torch.tensor([row + [end] * (longest - len(row)) for row in rows], device=inner.device)
        mask_NT = torch.tensor([[1.0] * len(row) + [0.0] * (longest - len(row)) for row in rows], device=inner.device)
        context = captioner.prepare(images_BCHW)
        rollout = Rollout(
            mask_RS=mask_NT, logp_RS=torch.zeros_like(mask_NT), tokens_NT=tokens_NT, texts=texts, context=context, group=LETTERS
        )
        logp_NT = captioner.logprobs(rollout)
        return (logp_NT.sum(1) / mask_NT.sum(1)).view(-1, LETTERS).cpu()

    return scores


@torch.no_grad()
def mini_mmt(
    scorer: Scorer, n: int = 400, seed: int = 0, split: Split = "val", batch_size: int = 64,
    image: Callable[[Tensor], Tensor] = lambda images: images,
) -> dict[str, Interval]:  # fmt: skip
    """Share of questions whose true option has the highest score, per subtask, with Wilson's 95 % interval.

    If all options have the same score, the first letter is the answer, which is right in a quarter of the questions.

    Args:
        scorer: Function that scores the options, such as `likelihood` of a captioner.
        n: Number of questions per subtask, a multiple of four.
        seed: Random seed of the questions.
        split: Split that the scenes are taken from.
        batch_size: Number of images per call of the scorer.
        image: Function applied to each batch of images before the scorer sees it. Controls use it to hide the image or to
            show another one.

    Returns:
        The subtasks, ``small_object`` (all of its four) and ``overall`` (all).
    """
    right: dict[str, int] = {}
    for subtask in SUBTASKS:
        asked = questions(subtask, n, seed, split)
        shown = image(render([one.scenes[one.answer] for one in asked]))
        right[subtask] = 0
        for start in range(0, n, batch_size):
            some = asked[start : start + batch_size]
            chosen = scorer(shown[start : start + batch_size], [one.options for one in some]).argmax(1).tolist()
            right[subtask] += sum(letter == one.answer for letter, one in zip(chosen, some, strict=True))
    small = [name for name in SUBTASKS if name.startswith("small_object")]
    found = {name: wilson(count, n) for name, count in right.items()}
    found["small_object"] = wilson(sum(right[name] for name in small), n * len(small))
    return {**found, "overall": wilson(sum(right.values()), n * len(SUBTASKS))}
