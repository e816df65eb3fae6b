"""Several results as a page: the tables of the report, and the worst, median and best pairs of every result that has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from uae.bench.report.table import BenchmarkTable
from uae.files.pictures import read_picture
from uae.report.bench_page import Table, write_bench_page
from uae.report.page import embedded

SIDE = 1200  # pixels of a contact sheet


def write_report_page(path: Path, tables: Sequence[BenchmarkTable], results: Mapping[str, Path]) -> None:
    """Write the page.

    Args:
        path: The HTML file.
        tables: One per benchmark.
        results: Title of each result to its file. A contact sheet has the name of the file with the suffix .png.
    """
    shown = []
    for table in tables:
        head, *rows = table.grid()
        shown.append(Table(table.benchmark, head, rows, table.legend()))
    sheets = {title: file.with_suffix(".png") for title, file in results.items()}
    pictures = {title: embedded(read_picture(sheet), SIDE) for title, sheet in sheets.items() if sheet.is_file()}
    write_bench_page(path, "Results", ["all scores times 100", f"{len(results)} results"], shown, sheets=pictures)
