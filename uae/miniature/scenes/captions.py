"""The closed language of the scenes: `describe` writes a caption, `parse` reads it back.

    a [size] color shape [at row column] and ... [on a color background]

Every bracket may be missing. How much a caption says is its `Detail`.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from uae.miniature.scenes.world import BACKGROUNDS, COLORS, COLUMNS, ROWS, SHAPES, SIZES, Object, Scene

_PHRASE = rf"a (?:({'|'.join(SIZES)}) )?({'|'.join(COLORS)}) ({'|'.join(SHAPES)})(?: at ({'|'.join(ROWS)}) ({'|'.join(COLUMNS)}))?"
_PLAIN = re.sub(r"\((?!\?)", "(?:", _PHRASE)
GRAMMAR = rf"{_PLAIN}(?: and {_PLAIN}){{0,2}}(?: on a (?:{'|'.join(BACKGROUNDS)}) background)?"
"""The pattern of a valid caption: 1 to 3 objects, the background at the end or not at all."""

WORDS = sorted({*SIZES, *COLORS, *SHAPES, *ROWS, *COLUMNS, *BACKGROUNDS, "a", "and", "at", "on", "background"})


@dataclass(frozen=True)
class Detail:
    """What a caption says, and how reliably.

    Args:
        size: Whether sizes are said.
        position: Whether places are said.
        background: Whether the background is said.
        omit_tiny: Chance that a tiny object is left out (one object always stays).
        error: Chance, per said attribute of an object, that its value is drawn at random (now and then the right one).
        shuffle: Objects in random order rather than reading order.
    """

    size: bool = True
    position: bool = True
    background: bool = True
    omit_tiny: float = 0.0
    error: float = 0.0
    shuffle: bool = False


DETAILED = Detail()
TERSE = Detail(size=False, position=False, background=False, omit_tiny=0.85)


def describe(scene: Scene, detail: Detail = DETAILED, rng: random.Random | None = None) -> str:
    """A caption of a complete scene. ``rng`` is needed when ``detail`` leaves anything to chance."""
    rng = rng or random.Random(0)
    kept = [obj for obj in scene.objects if obj.size != "tiny" or rng.random() >= detail.omit_tiny]
    kept = kept or [rng.choice(scene.objects)]
    if detail.shuffle:
        rng.shuffle(kept)

    def said(value: str | None, values: tuple[str, ...]) -> str:
        return rng.choice(values) if detail.error and rng.random() < detail.error else value or ""

    phrases = []
    for obj in kept:
        size = f"{said(obj.size, tuple(SIZES))} " if detail.size else ""
        color, shape = said(obj.color, tuple(COLORS)), said(obj.shape, SHAPES)
        place = f" at {said(obj.row, ROWS)} {said(obj.column, COLUMNS)}" if detail.position else ""
        phrases.append(f"a {size}{color} {shape}{place}")
    ending = f" on a {scene.background} background" if detail.background else ""
    return " and ".join(phrases) + ending


def parse(caption: str) -> Scene | None:
    """What a caption says, or None where it is not valid. Attributes it does not say are None."""
    if not re.fullmatch(GRAMMAR, caption):
        return None
    background = re.search(rf" on a ({'|'.join(BACKGROUNDS)}) background$", caption)
    objects = tuple(
        Object(row or None, column or None, color, shape, size or None)
        for size, color, shape, row, column in re.findall(_PHRASE, caption)
    )
    return Scene(background.group(1) if background else None, objects)


def is_detailed(caption: str) -> bool:
    """Whether a caption is valid and says the background and every attribute of every object it names."""
    scene = parse(caption)
    return scene is not None and scene.background is not None and all(obj.size and obj.row for obj in scene.objects)
