"""Results side by side: one table per benchmark, as Markdown, CSV or LaTeX, all scores multiplied by 100."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from uae.bench.paired import Difference
from uae.bench.report.published import SOURCE, Published, number
from uae.bench.result import Score

PAPER = "paper: "


@dataclass(frozen=True)
class SystemColumn:
    """One system.

    Args:
        system: Name of the system.
        scores: Its scores by name.
        differences: Score minus the baseline's, for each score of both; empty for the baseline itself.
        paired: The same over common cases with intervals, for the scores that have cases.
    """

    system: str
    scores: Mapping[str, Score]
    differences: Mapping[str, float] = field(default_factory=dict)
    paired: Mapping[str, Difference] = field(default_factory=dict)


@dataclass(frozen=True)
class BenchmarkTable:
    """The results of one benchmark.

    Args:
        benchmark: Name of the benchmark, with variant and backend.
        names: Names of the scores, in the order of the rows.
        columns: One column per measured system.
        baseline: Name of the system that differences are to.
        published: The paper's models that have any of the scores.
        notes: Remarks about the comparison, printed below the table.
    """

    benchmark: str
    names: Sequence[str]
    columns: Sequence[SystemColumn]
    baseline: str
    published: Sequence[Published] = ()
    notes: Sequence[str] = ()

    def grid(self) -> list[list[str]]:
        """The cells as text, a list per row, titles first. Columns are systems, then differences, then the paper's models."""
        compared = [column for column in self.columns if column.differences]
        titles = [column.system for column in self.columns] + [f"{column.system} - {self.baseline}" for column in compared]
        rows = [["", *titles, *(f"{PAPER}{row.model}" for row in self.published)]]
        for name in self.names:
            cells = [_score(column.scores.get(name)) for column in self.columns]
            cells += [_difference(column, name) for column in compared]
            rows.append([name, *cells, *(_published(row, name) for row in self.published)])
        return rows

    def legend(self) -> list[str]:
        """The notes, and explanations of the differences and of the paper's numbers."""
        lines = list(self.notes)
        if any(column.differences for column in self.columns):
            lines.append("differences are paired over common cases, [95 % interval]; p: McNemar's exact test")
        if self.published:
            lines.append(f"paper: published in {SOURCE} and measured by its authors, not by us; ?: not checked against its text")
        return lines


def _score(score: Score | None) -> str:
    return f"{100 * score['value']:.2f} [{100 * score['low']:.2f}, {100 * score['high']:.2f}] n={score['n']}" if score else ""


def _difference(column: SystemColumn, name: str) -> str:
    if name not in column.differences:
        return ""
    if name not in column.paired:
        return f"{100 * column.differences[name]:+.2f} (not paired)"
    one = column.paired[name]
    p = "" if one.p is None else f" p={one.p:.2g}"
    return f"{100 * one.value:+.2f} [{100 * one.low:+.2f}, {100 * one.high:+.2f}] n={one.n}{p}"


def _published(row: Published, name: str) -> str:
    found = number(row, name)
    return "" if found is None else f"{100 * found[0]:.2f}{'?' * found[1]}"


def markdown(tables: Sequence[BenchmarkTable]) -> str:
    """All tables as Markdown."""
    lines = []
    for table in tables:
        head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table.grid())
        lines += [f"## {table.benchmark}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"* {line}" for line in table.legend()), ""]
    return "\n".join(lines)


def latex(tables: Sequence[BenchmarkTable]) -> str:
    """All tables as LaTeX, one ``table`` each, with the rules of booktabs."""
    lines = ["% \\usepackage{booktabs}"]
    for table in tables:
        head, *rows = ([_escaped(cell) for cell in row] for row in table.grid())
        lines += ["\\begin{table}", f"\\caption{{{_escaped('. '.join([table.benchmark, *table.legend()]))}}}"]
        lines += [f"\\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}", "\\toprule", f"{' & '.join(head)} \\\\", "\\midrule"]
        lines += [f"{' & '.join(row)} \\\\" for row in rows]
        lines += ["\\bottomrule", "\\end{tabular}", "\\end{table}", ""]
    return "\n".join(lines)


def _escaped(text: str) -> str:
    signs = {"\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
    return "".join(signs.get(sign, f"\\{sign}" if sign in "&%$#_{}" else sign) for sign in text)


def comma_separated(tables: Sequence[BenchmarkTable]) -> str:
    """All tables as CSV: one line per system and score, unrounded."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["benchmark", "score", "system", "source", "value", "low", "high", "n", "difference_to",
                     "difference", "difference_low", "difference_high", "difference_n", "p"])  # fmt: skip
    for table in tables:
        for name in table.names:
            for column in table.columns:
                if one := column.scores.get(name):
                    ours = [100 * one["value"], 100 * one["low"], 100 * one["high"], one["n"]]
                    rest = [table.baseline, *_difference_cells(column, name)] if name in column.differences else [""] * 6
                    writer.writerow([table.benchmark, name, column.system, "measured", *ours, *rest])
            for row in table.published:
                if found := number(row, name):
                    source = f"{SOURCE}{' (uncertain)' * found[1]}"
                    writer.writerow([table.benchmark, name, row.model, source, 100 * found[0], *[""] * 9])
    return file.getvalue()


def _difference_cells(column: SystemColumn, name: str) -> list[float | str]:
    """Difference, lower and upper end, number of cases and p-value; a cell is empty where there is no such number."""
    gap = column.paired.get(name)
    if gap is None:
        return [100 * column.differences[name], "", "", "", ""]
    return [100 * gap.value, 100 * gap.low, 100 * gap.high, gap.n, "" if gap.p is None else gap.p]
