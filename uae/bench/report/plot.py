"""Results side by side as a plot: points with intervals for measured systems, hollow marks for the paper's numbers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uae.bench.report.published import number
from uae.bench.report.table import PAPER, BenchmarkTable

WIDTH, LINE = 8.0, 0.34  # inches


def write_plot(path: str | Path, tables: Sequence[BenchmarkTable]) -> None:
    """Plot one panel per benchmark, with a line per score and a point per system.

    Args:
        path: Path of the plot; its suffix is the format (.png, .pdf, .svg).
        tables: Tables of the benchmarks.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'uae[bench]'") from error
    heights = [LINE * len(table.names) + 1 for table in tables]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        _plot_panel(panel, table)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)


def _plot_panel(panel: Any, table: BenchmarkTable) -> None:  # matplotlib is optional, and its types with it
    ours, theirs = len(table.columns), len(table.published)
    step = 0.8 / max(ours + theirs, 1)
    for place, column in enumerate(table.columns):
        rows = [(line, column.scores[name]) for line, name in enumerate(table.names) if name in column.scores]
        value = [100 * one["value"] for _, one in rows]
        below = [max(0.0, 100 * (one["value"] - one["low"])) for _, one in rows]
        above = [max(0.0, 100 * (one["high"] - one["value"])) for _, one in rows]
        y = [line - 0.4 + (place + 0.5) * step for line, _ in rows]
        panel.errorbar(value, y, xerr=[below, above], fmt="o", markersize=4, capsize=2, label=column.system)
    for place, row in enumerate(table.published, start=ours):
        found = [(line, got[0]) for line, name in enumerate(table.names) if (got := number(row, name))]
        y = [line - 0.4 + (place + 0.5) * step for line, _ in found]
        style = {"linestyle": "", "marker": "D", "markersize": 4, "fillstyle": "none", "label": f"{PAPER}{row.model}"}
        panel.plot([100 * one for _, one in found], y, **style)
    panel.set_yticks(range(len(table.names)), table.names)
    panel.invert_yaxis()
    panel.set_title(table.benchmark, fontsize=10)
    panel.grid(axis="x", alpha=0.3)
    panel.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
