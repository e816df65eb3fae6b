"""A picture of the worst, the median and the best pairs of source and reconstruction, which shows what a score means."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps

from uae.files.pictures import read_picture
from uae.files.whole import write_whole

CELL, CAPTION, MARGIN, GAP = 160, 16, 4, 20
ROWS = 4


def worst_median_best(score_N: np.ndarray, rows: int = ROWS) -> dict[str, list[int]]:
    """Positions of the worst, the median and the best pairs, each once, from worst to best."""
    order = np.argsort(score_N, kind="stable").tolist()
    rows = min(rows, max(1, len(order) // 3))
    middle = (len(order) - rows) // 2
    parts = {"worst": order[:rows], "median": order[middle : middle + rows], "best": order[-rows:]}
    taken: set[int] = set()
    chosen = {}
    for name, positions in parts.items():
        chosen[name] = [n for n in positions if n not in taken]
        taken |= set(positions)
    return chosen


def write_contact_sheet(
    path: Path, pairs: Sequence[tuple[Path, Path]], names: Sequence[str], score_N: np.ndarray, max_pixels: int
) -> None:
    """Write the contact sheet as PNG.

    Args:
        path: Path of the PNG file.
        pairs: Files of source and reconstruction.
        names: Name of each pair.
        score_N: Score of each pair; it is printed multiplied by 100.
        max_pixels: Images with more pixels count as unreadable.
    """
    columns = worst_median_best(score_N)
    width, height = 2 * CELL + MARGIN, CELL + CAPTION
    rows = max(map(len, columns.values()))
    sheet = Image.new("RGB", (len(columns) * (width + GAP), CAPTION + rows * (height + MARGIN)), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, positions) in enumerate(columns.items()):
        left = column * (width + GAP)
        pen.text((left, 1), f"{title}: source, reconstruction", fill="black")
        for row, n in enumerate(positions):
            top = CAPTION + row * (height + MARGIN)
            for side, file in enumerate(pairs[n]):
                picture = ImageOps.contain(read_picture(file, max_pixels), (CELL, CELL))
                sheet.paste(picture, (left + side * (CELL + MARGIN), top))
            pen.text((left, top + CELL + 1), f"{100 * score_N[n]:.2f}  {_plain(names[n])}", fill="black")
    content = BytesIO()
    # For photographs, higher levels make the file a sixth smaller and take twice the time.
    sheet.save(content, format="PNG", compress_level=1)
    write_whole(path, content.getvalue())


def _plain(name: str) -> str:
    """The end of a name, in letters that the built-in font can draw."""
    return name[-40:].encode("ascii", "replace").decode()
