"""A result of protocol 1 as a page: scores with intervals, and the worst, median and best pairs with their captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.score.contact_sheet import worst_median_best
from uae.files.pictures import read_picture
from uae.report.bench_page import Pair, Pairs, Table, write_bench_page
from uae.report.page import embedded


def write_score_page(
    path: Path,
    result: Mapping[str, Any],
    tables: Sequence[Table],
    files: Sequence[tuple[Path, Path]],
    captions: Mapping[str, str],
    max_pixels: int,
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        result: Content of the result file; ``per_image`` has the N scored pairs.
        tables: The result as tables.
        files: Source and reconstruction of the N pairs.
        captions: Name of a source to its caption, where that is known.
        max_pixels: Images with more pixels count as unreadable.
    """
    rows = result["per_image"]
    chosen = worst_median_best(np.array([row["overall"] for row in rows]))
    groups = []
    for title, positions in chosen.items():
        pairs = []
        for n in positions:
            source, reconstruction = (embedded(read_picture(file, max_pixels)) for file in files[n])
            name, score = rows[n]["name"], f"{100 * rows[n]['overall']:.2f}"
            pairs.append(Pair(name, score, source, reconstruction, captions.get(name, "")))
        groups.append(Pairs(f"The {title} pairs", pairs))
    about = [result["benchmark"], f"{result['scores']['overall']['n']} pairs", "cosines times 100, 95 % intervals over images"]
    write_bench_page(path, str(result["system"]), about, tables, groups)
