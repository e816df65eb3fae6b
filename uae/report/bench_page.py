"""The page of benchmark results: tables, and pairs of a source and its reconstruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from uae.report.page import write_page


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: What stands above it; may be empty.
        head: Titles of the columns.
        rows: Cells as text.
        notes: What stands below it.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Pair:
    """A source and its reconstruction.

    Args:
        name: Name of the source.
        score: What the pair scored, as text.
        source, reconstruction: Addresses of pictures, see `uae.report.page.embedded`.
        caption: What the reconstruction was drawn from; empty if that is not known.
    """

    name: str
    score: str
    source: str
    reconstruction: str
    caption: str = ""


@dataclass(frozen=True)
class Pairs:
    """Pairs that belong together, as the worst ones."""

    title: str
    pairs: Sequence[Pair] = field(default_factory=list)


def write_bench_page(
    path: Path,
    title: str,
    about: Sequence[str],
    tables: Sequence[Table],
    pairs: Sequence[Pairs] = (),
    sheets: Mapping[str, str] | None = None,
) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        title: Its title.
        about: What is said below the title, in parts.
        tables: What was measured.
        pairs: Pictures of pairs.
        sheets: Name of a result to the address of its contact sheet.
    """
    write_page(path, "bench.html", title=title, about=about, tables=tables, pairs=pairs, sheets=sheets or {})
