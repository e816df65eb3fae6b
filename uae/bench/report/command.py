"""Several results in one report: a table per benchmark, differences with intervals, and the paper's published numbers.

python -m uae.bench report a.json b.json ... [--paper true] [--baseline NAME] [--output report.md] [--plot report.png]
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uae.bench.arguments import listed, run
from uae.bench.paired import paired_differences, unlikeness
from uae.bench.report.page import write_report_page
from uae.bench.report.plot import write_plot
from uae.bench.report.published import number, published
from uae.bench.report.table import BenchmarkTable, SystemColumn, comma_separated, latex, markdown
from uae.bench.result import cases_of, read_result

FORMATS: dict[str, Callable[[Sequence[BenchmarkTable]], str]] = {".md": markdown, ".csv": comma_separated, ".tex": latex}
PAGE = ".html"
PLOTS = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class Entry:
    """A result and the path of its file."""

    file: Path
    result: dict[str, Any]

    @property
    def system(self) -> str:
        """Name of the system that was measured."""
        return str(self.result["system"])


def report(
    results: list[str],
    paper: bool = False,
    baseline: str | None = None,
    output: str | None = None,
    plot: str | None = None,
    scores: str | None = None,
) -> list[BenchmarkTable]:
    """Put results side by side. Only results with exactly the same benchmark name share a table.

    Args:
        results: Result files; the word --results may be left out.
        paper: Show the paper's published numbers in columns of their own.
        baseline: Name of the system that differences are to, or one of its result files; the default is the first result's system.
        output: File for the report; its suffix (.md, .csv, .tex or .html) is the format. A page (.html) also shows the contact
            sheets that lie beside the results.
        plot: File for a plot of the report; its suffix (.png, .pdf or .svg) is the format.
        scores: Regular expression; only scores whose name it finds are shown.
    """
    if output and Path(output).suffix not in (*FORMATS, PAGE):
        raise ValueError(f"--output {output!r}: allowed: a file of suffix {', '.join((*FORMATS, PAGE))}")
    if plot and Path(plot).suffix not in PLOTS:
        raise ValueError(f"--plot {plot!r}: allowed: a file of suffix {', '.join(PLOTS)}")
    try:
        re.compile(scores or "")
    except re.error as error:
        raise ValueError(f"--scores {scores!r} is no regular expression: {error}") from None
    files = [*results, *([baseline] if baseline and baseline.endswith(".json") else [])]
    entries = [Entry(Path(file), read_result(file)) for file in dict.fromkeys(files)]
    if not entries:
        raise ValueError("no results; give result files that uae.bench wrote")
    by = _baseline(entries, baseline)
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(entry.result["benchmark"], []).append(entry)
    tables = [_benchmark_table(name, some, by, paper, scores) for name, some in groups.items()]
    near = _alike(list(groups))
    text = markdown(tables)
    print("\n".join([text, *near]))
    if output:
        _write(Path(output), tables, entries)
    if plot:
        write_plot(plot, tables)
    return tables


def _write(target: Path, tables: Sequence[BenchmarkTable], entries: Sequence[Entry]) -> None:
    """Write the report in the format of the suffix."""
    if target.suffix == PAGE:
        write_report_page(target, tables, {f"{entry.system} ({entry.result['benchmark']})": entry.file for entry in entries})
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(FORMATS[target.suffix](tables))


def _baseline(entries: Sequence[Entry], baseline: str | None) -> str:
    names = list(dict.fromkeys(entry.system for entry in entries))
    if baseline is None:
        return names[0]
    of_file = [entry.system for entry in entries if entry.file == Path(baseline)]
    if not of_file and baseline not in names:
        raise ValueError(f"--baseline {baseline!r} is no result and none of the systems {', '.join(names)}")
    return of_file[0] if of_file else baseline


def _benchmark_table(benchmark: str, entries: Sequence[Entry], baseline: str, paper: bool, pattern: str | None) -> BenchmarkTable:
    """The table of one benchmark; scores are in the order in which the results hold them."""
    systems = [entry.system for entry in entries]
    twice = sorted({name for name in systems if systems.count(name) > 1})
    if twice:
        raise ValueError(f"two results of {benchmark} are of {twice[0]!r}; score one again with another --system")
    everything = dict.fromkeys(name for entry in entries for name in entry.result["scores"])
    names = [name for name in everything if re.search(pattern or "", name, re.IGNORECASE)]
    if not names:
        raise ValueError(f"--scores {pattern!r} finds no score of {benchmark}: {', '.join(entries[0].result['scores'])}")
    base = next((entry for entry in entries if entry.system == baseline), None)
    notes = [] if base or len(entries) == 1 else [f"{baseline} has no result here: no differences"]
    columns = []
    for entry in entries:
        column, more = _column(entry, base)
        columns.append(column)
        notes += more
    rows, caveat = published(benchmark) if paper else ([], "")
    rows = [row for row in rows if any(number(row, name) for name in names)]
    if paper:
        notes.append(caveat if rows else "the paper has no number for this benchmark, or not for these inputs or encoders")
    return BenchmarkTable(benchmark, names, columns, baseline, rows, notes)


def _column(entry: Entry, base: Entry | None) -> tuple[SystemColumn, list[str]]:
    """A system's column with its differences to the baseline, and notes for the reader."""
    system, ours = entry.system, entry.result
    if base is None or entry is base:
        return SystemColumn(system, ours["scores"]), []
    systems = f"{system} and {base.system}"
    if unlike := unlikeness(ours, base.result):
        return SystemColumn(system, ours["scores"]), [f"{systems} are not compared: {'; '.join(unlike)}"]
    scores, theirs = ours["scores"], base.result["scores"]
    gaps = {name: score["value"] - theirs[name]["value"] for name, score in scores.items() if name in theirs}
    found = paired_differences(cases_of(ours), cases_of(base.result))
    paired = {name: difference for name, difference in found.items() if name in gaps}
    notes = [] if paired else [f"{systems} have no cases to pair: differences without interval"]
    if any(difference.n < scores[name]["n"] for name, difference in paired.items()):
        notes.append(f"{systems} share only some cases")
    return SystemColumn(system, scores, gaps, paired), notes


def _alike(benchmarks: Sequence[str]) -> list[str]:
    """Notes about benchmarks whose names differ only in variant or backend, which must not be compared."""
    kinds: dict[str, list[str]] = {}
    for name in benchmarks:
        kinds.setdefault(re.split(r" [(\[]", name)[0], []).append(name)
    return [f"not the same, so not in one table: {', '.join(some)}" for some in kinds.values() if len(some) > 1]


def main(args: Sequence[str]) -> None:
    """Run the command with the words behind its name: leading words are result files, and ``--paper`` without a value means true."""
    words = list(args)
    first = next((place for place, word in enumerate(words) if word.startswith("--")), len(words))
    words = [*(["--results"] if first else []), *words]
    for place in reversed([place for place, word in enumerate(words) if word == "--paper"]):
        if words[place + 1 : place + 2] not in (["true"], ["false"]):
            words.insert(place + 1, "true")
    run("report", report, listed(words, "--results"))
