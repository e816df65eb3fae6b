"""A world whose ground truth is exact: up to three coloured shapes on a 3 x 3 grid, 24 x 24 pixels.

Everything a caption can say about a scene is one of five attributes (color, shape, size, position, background), so
captions, images and scenes convert into each other without a learned model: `render`, `detect`, `describe`, `parse`.
Objects are aligned with the 8-pixel cells, which are also the stride of the miniature's autoencoder.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Split = Literal["train", "val", "test"]

CELL = 8
GRID = 3
SIDE = CELL * GRID
COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.9, 0.1, 0.1),
    "green": (0.1, 0.7, 0.1),
    "blue": (0.2, 0.4, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.6, 0.1, 0.8),
    "cyan": (0.1, 0.9, 0.9),
    "white": (1.0, 1.0, 1.0),
    "pink": (1.0, 0.4, 0.7),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "black": (0.0, 0.0, 0.0),
    "gray": (0.5, 0.5, 0.5),
    "navy": (0.0, 0.05, 0.35),
    "brown": (0.4, 0.22, 0.08),
}
SIZES: dict[str, int] = {"tiny": 3, "medium": 5, "large": 7}  # pixels
SHAPES = ("square", "ring", "cross", "triangle")
LETTERS = dict(zip(SHAPES, "IOXA", strict=True))  # what a shape reads as, where objects stand side by side as a word
LEAST_LEAD = 0.04  # smallest lead of the nearest picture over any other, see `_lead`; refuses blends of two
KINDS = 1 + len(SHAPES) * len(SIZES) * len(COLORS)  # what a cell can hold: nothing, or one of these objects
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")


@dataclass(frozen=True, order=True)
class Object:
    """One object. ``size``, ``row`` and ``column`` are None where a caption does not say them."""

    row: str | None
    column: str | None
    color: str
    shape: str
    size: str | None


@dataclass(frozen=True)
class Scene:
    """A background and 1 to 3 objects, at most one per cell, in reading order."""

    background: str | None
    objects: tuple[Object, ...]

    @property
    def split(self) -> Split:
        """Where this scene belongs, by the hash of its content: 80 % train, 10 % val, 10 % test. Nothing can leak."""
        digest = hashlib.sha1(repr((self.background, sorted(map(repr, self.objects)))).encode()).digest()[0] % 10
        return "test" if digest == 0 else "val" if digest == 1 else "train"


def sample_scene(rng: random.Random, counts: tuple[int, ...] = (1, 2, 3)) -> Scene:
    """A scene with uniformly drawn attributes."""
    cells = sorted(rng.sample(range(GRID * GRID), rng.choice(counts)))
    objects = (
        Object(
            ROWS[cell // GRID],
            COLUMNS[cell % GRID],
            rng.choice(list(COLORS)),
            rng.choice(SHAPES),
            rng.choice(list(SIZES)),
        )
        for cell in cells
    )
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(objects))


def sample_word(rng: random.Random) -> Scene:
    """A scene that carries a word: three tiny objects of one color side by side, whose shapes are its letters."""
    row, color = rng.choice(ROWS), rng.choice(list(COLORS))
    letters = (Object(row, column, color, rng.choice(SHAPES), "tiny") for column in COLUMNS)
    return Scene(rng.choice(list(BACKGROUNDS)), tuple(letters))


def word_of(scene: Scene) -> str:
    """The letters of a scene's objects in reading order; "?" for an object that is not recognized."""
    return "".join(LETTERS.get(obj.shape, "?") for obj in scene.objects)


def scene_of(index: int, split: Split = "train", seed: int = 0, counts: tuple[int, ...] = (1, 2, 3), words: bool = False) -> Scene:
    """The ``index``-th scene of a split: a pure function, the same on every rank, worker and run.

    Args:
        index: Number of the scene.
        split: Part of the data that the scene belongs to.
        seed: Random seed of all scenes.
        counts: How many objects a scene may have, drawn uniformly.
        words: Whether scenes carry words, see `sample_word`. They have three objects then, whatever ``counts`` is.
    """
    rng = random.Random(f"{seed}/{split}/{index}")
    while True:
        scene = sample_word(rng) if words else sample_scene(rng, counts)
        if scene.split == split:
            return scene


def _glyph(shape: str, size: int) -> Tensor:
    """Which of the cell's 8 x 8 pixels the object covers, bool."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    middle, edge = size // 2, max(size // 4, 1)
    inside = {
        "square": torch.ones(size, size, dtype=torch.bool),
        "ring": (y < edge) | (x < edge) | (y >= size - edge) | (x >= size - edge),
        "cross": (y == middle) | (x == middle),
        "triangle": (x - middle).abs() * 2 <= y,
    }[shape]
    cell = torch.zeros(CELL, CELL, dtype=torch.bool)
    start = (CELL - size) // 2
    cell[start : start + size, start : start + size] = inside
    return cell


def code_of(obj: Object) -> int:
    """An object's row in the table of cell pictures (its position aside); 0 is the empty cell."""
    return 1 + (SHAPES.index(obj.shape) * len(SIZES) + list(SIZES).index(obj.size or "")) * len(COLORS) + list(COLORS).index(obj.color)


def object_of(code: int, cell: int) -> Object:
    """The inverse of `code_of`."""
    shape_size, color = divmod(code - 1, len(COLORS))
    shape, size = divmod(shape_size, len(SIZES))
    return Object(ROWS[cell // GRID], COLUMNS[cell % GRID], list(COLORS)[color], SHAPES[shape], list(SIZES)[size])


@lru_cache(maxsize=1)
def cell_pictures() -> Tensor:
    """Every picture a cell can hold: ``[backgrounds, 1 + shapes*sizes*colors, 3, 8, 8]`` in [0, 1]."""
    glyphs = torch.stack([_glyph(shape, size) for shape in SHAPES for size in SIZES.values()])  # [12, 8, 8]
    ink = torch.tensor(list(COLORS.values()))  # [8, 3]
    paper = torch.tensor(list(BACKGROUNDS.values()))  # [4, 3]
    glyphs = glyphs[:, None, None].expand(-1, len(COLORS), 3, -1, -1).reshape(-1, 3, CELL, CELL)
    ink = ink.repeat(len(SHAPES) * len(SIZES), 1)[:, :, None, None]
    drawn = torch.where(glyphs, ink, paper[:, None, :, None, None])  # [4, 96, 3, 8, 8]
    empty = paper[:, None, :, None, None].expand(-1, 1, -1, CELL, CELL)
    return torch.cat([empty, drawn], dim=1)


def cell_codes(scenes: list[Scene]) -> Tensor:
    """What each cell holds, ``[N, 9]``: `code_of` its object, 0 where it is empty."""
    codes = torch.zeros(len(scenes), GRID * GRID, dtype=torch.long)
    for n, scene in enumerate(scenes):
        for obj in scene.objects:
            codes[n, ROWS.index(obj.row or "") * GRID + COLUMNS.index(obj.column or "")] = code_of(obj)
    return codes


def render(scenes: list[Scene]) -> Tensor:
    """Images ``[N, 3, 24, 24]`` in [0, 1] of complete scenes."""
    backgrounds = torch.tensor([list(BACKGROUNDS).index(scene.background or "") for scene in scenes])
    cells = cell_pictures()[backgrounds[:, None], cell_codes(scenes)]  # [N, 9, 3, 8, 8]
    return cells.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, SIDE, SIDE)


def detect(images_NCHW: Tensor, tolerance: float = 0.2) -> list[Scene]:
    """The scene an image shows, by exact template matching of every cell.

    A cell shows no known object when it is further than ``tolerance`` (root mean square over its pixels, in [0, 1]
    units) from its nearest picture, or halfway towards another picture: a blend is neither. It becomes an ``Object`` of
    shape "unknown", which equals nothing.

    Args:
        images_NCHW: ``[N, 3, 24, 24]`` in [0, 1].
        tolerance: Largest distance to the nearest picture.
    """
    pictures = cell_pictures()  # [P, K, 3, 8, 8]
    cells = images_NCHW.detach().cpu().float().unflatten(2, (GRID, CELL)).unflatten(4, (GRID, CELL))
    cells = cells.permute(0, 2, 4, 1, 3, 5).reshape(-1, 3 * CELL * CELL)  # [N * 9, 192]
    distance = torch.cdist(cells, pictures.flatten(2).flatten(0, 1)).square().view(-1, GRID * GRID, len(pictures), KINDS)
    paper = distance.amin(3).sum(1).argmin(1)  # [N]: one background for the whole image
    best, code = distance[torch.arange(len(paper)), :, paper].min(-1)  # [N, 9]
    unknown = (best / (3 * CELL * CELL)).sqrt() > tolerance
    unknown |= _lead(paper[:, None] * KINDS + code, best, distance.flatten(2)) < LEAST_LEAD
    scenes = []
    for n in range(len(paper)):
        objects = []
        for cell in range(GRID * GRID):
            if unknown[n, cell]:
                objects.append(Object(ROWS[cell // GRID], COLUMNS[cell % GRID], "unknown", "unknown", "unknown"))
            elif code[n, cell]:
                objects.append(object_of(int(code[n, cell]), cell))
        scenes.append(Scene(list(BACKGROUNDS)[paper[n]], tuple(objects)))
    return scenes


def _lead(nearest: Tensor, best: Tensor, distance: Tensor) -> Tensor:
    """How clearly each cell shows its nearest picture and no other, ``[N, 9]``: 1 on the picture, 0 halfway to another.

    Args:
        nearest: ``[N, 9]``, the number of the cell's picture.
        best: ``[N, 9]``, squared distance to it.
        distance: ``[N, 9, pictures]``, squared distances to all.
    """
    lead = (distance - best[..., None]) / _apart()[nearest]
    return lead.scatter(2, nearest[..., None], torch.inf).amin(2)


@lru_cache(maxsize=1)
def _apart() -> Tensor:
    """Squared distances of every picture to every other, ``[pictures, pictures]``."""
    pictures = cell_pictures().flatten(2).flatten(0, 1)
    return torch.cdist(pictures, pictures).square()
