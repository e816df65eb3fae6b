"""Pictures for people: images beside each other, each above its own lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypedDict

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

SIDE = 160  # of a tile, in pixels
GAP = 8  # between two tiles of a row, in pixels
LINE = 12  # height of a line of text, in pixels
WIDTH = 26  # characters of Pillow's default font that fit below a tile


class Tile(NamedTuple):
    """An image and what is written below it.

    Args:
        image_CHW: The image in [0, 1], of any size and floating-point type.
        lines: Lines of text; `wrapped` makes lines that fit from a caption.
    """

    image_CHW: Tensor
    lines: Sequence[str]


def wrapped(caption: str) -> list[str]:
    """A caption as lines that fit below a tile; at most 12."""
    return textwrap.wrap(caption, WIDTH, max_lines=12, placeholder=" ...") or ["(empty)"]


def draw_tiles(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """One picture of rows of tiles; all rows are as high as the one with the most lines of text."""
    height = SIDE + LINE * (1 + max(len(tile.lines) for row in rows for tile in row))
    canvas = Image.new("RGB", ((SIDE + GAP) * max(map(len, rows)), height * len(rows)), "white")
    for number, row in enumerate(rows):
        for column, tile in enumerate(row):
            _paste(canvas, (SIDE + GAP) * column, height * number, tile)
    return canvas


class Drawn(TypedDict):
    """What a system made of several images: ``reconstruction`` ``[N, 3, H, W]`` in [0, 1], and N strings ``caption``."""

    reconstruction: Tensor
    caption: list[str]


def draw_columns(source_NCHW: Tensor, columns: Mapping[str, Drawn | None]) -> Image.Image:
    """One picture with a row per image: the source, then what was drawn of it, a column for each of ``columns`` by its name."""
    rows = []
    for n, image_CHW in enumerate(source_NCHW):
        drawn = [Tile(one["reconstruction"][n], [name, *wrapped(one["caption"][n])]) for name, one in columns.items() if one]
        rows.append([Tile(image_CHW, ["source"]), *drawn])
    return draw_tiles(rows)


def _paste(canvas: Image.Image, left: int, top: int, tile: Tile) -> None:
    """An image, scaled to fit, above its text. Small images keep hard pixels: blur would hide what the model drew."""
    image = to_pil_image(tile.image_CHW.float().nan_to_num().clamp(0, 1).cpu())
    scale = SIDE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas.paste(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC), (left, top))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(10)
    for i, line in enumerate(tile.lines):
        draw.text((left + 2, top + SIDE + 2 + LINE * i), line, fill="black", font=font)
