"""What several stages of training have changed together: a table and a picture, in the folder of the first."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from uae.files import examples

Row = list[float | None]


@dataclass(frozen=True)
class Trained:
    """A stage that has been trained.

    Args:
        title: Its column: its number, and what trained.
        files: Its configuration files.
        folder: Where its results are.
    """

    title: str
    files: list[str]
    folder: Path


def report(stages: list[Trained]) -> None:
    """Print the table of all metrics, and write it and the picture beside the results of the first stage.

    Args:
        stages: All stages. Those without a summary or examples leave their column empty.
    """
    folder = stages[0].folder
    rows = metrics(stages)
    if rows:
        titles = ["start", *(stage.title for stage in stages)]
        print(table(titles, rows))
        listed = [{"stage": one.title, "files": one.files, "folder": str(one.folder)} for one in stages]
        (folder / "stages.json").write_text(json.dumps({"stages": listed, "metrics": rows}, indent=2) + "\n")
        (folder / "stages.md").write_text(markdown(titles, rows))
    draw(stages)


def metrics(stages: list[Trained]) -> dict[str, Row]:
    """Of every metric: its value at the start, then after each stage."""
    summaries = [_summary(stage.folder) for stage in stages]
    columns = [summaries[0].get("before", {}), *(one.get("after", {}) for one in summaries)]
    names = dict.fromkeys(name for column in columns for name in column)
    return {name: [column.get(name) for column in columns] for name in names}


def _summary(folder: Path) -> dict[str, dict[str, float]]:
    file = folder / "summary.json"
    found: dict[str, dict[str, float]] = json.loads(file.read_text()) if file.is_file() else {}
    return found


def table(titles: list[str], rows: dict[str, Row]) -> str:
    """Metrics, one per line."""
    widths = [max(8, len(title)) for title in titles]
    name_width = max(map(len, rows))
    lines = [" " * name_width + "".join(f"  {title:>{width}}" for title, width in zip(titles, widths, strict=True))]
    for name, row in rows.items():
        values = (f"  {_number(value):>{width}}" for value, width in zip(row, widths, strict=True))
        lines.append((f"{name:{name_width}}" + "".join(values)).rstrip())
    return "\n".join(lines)


def markdown(titles: list[str], rows: dict[str, Row]) -> str:
    """The same table in Markdown."""
    lines = [f"| metric | {' | '.join(titles)} |", f"|---|{'---|' * len(titles)}"]
    lines += [f"| {name} | {' | '.join(map(_number, row))} |" for name, row in rows.items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def draw(stages: list[Trained]) -> None:
    """Draw the same images at the start and after each stage, as far as the stages have kept them."""
    kept = {stage.title: examples.load(file) for stage in stages if (file := stage.folder / "examples.pt").is_file()}
    if not kept:
        return
    times = {"start": next(iter(kept.values()))["before"], **{f"after {title}": one["after"] for title, one in kept.items()}}
    examples.comparison(times).save(stages[0].folder / "stages.png")
