"""Images in rows, each above its text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

TILE = 160  # side of an image, in pixels
GAP = 8
LINE = 14
FONT = 12  # of Pillow's default font, whose spaces nearly vanish at smaller sizes
WIDTH = 25  # characters that fit in a tile

Tile = tuple[Tensor, Sequence[str]]  # an image [3, H, W] in [0, 1], and the lines below it


def wrapped(text: str) -> list[str]:
    """A caption in lines as wide as a tile."""
    return textwrap.wrap(text, WIDTH, max_lines=12, placeholder=" ...") or ["(empty)"]


def grid(rows: Sequence[Sequence[Tile]]) -> Image.Image:
    """One picture of all tiles; the longest text sets the height of all rows."""
    longest = max((len(lines) for row in rows for _, lines in row), default=0)
    height, columns = TILE + LINE * (1 + longest), max(map(len, rows), default=0)
    canvas = Image.new("RGB", ((TILE + GAP) * columns, height * len(rows)), "white")
    for number, row in enumerate(rows):
        for column, (image_CHW, lines) in enumerate(row):
            _paste(canvas, (TILE + GAP) * column, height * number, image_CHW, lines)
    return canvas


def _paste(canvas: Image.Image, left: int, top: int, image_CHW: Tensor, lines: Sequence[str]) -> None:
    """An image, scaled to fit, above its text. Small images keep hard pixels: blur would hide what the model drew."""
    image = to_pil_image(image_CHW.float().nan_to_num().clamp(0, 1).cpu())
    scale = TILE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    canvas.paste(image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BICUBIC), (left, top))
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(FONT)
    for i, line in enumerate(lines):
        draw.text((left + 2, top + TILE + 2 + LINE * i), line, fill="black", font=font)
