"""The scalars that a run has logged, read from TensorBoard's events or from a CSV file."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

Curve = list[tuple[int, float]]  # step and value, ordered by step; finite values only
EVENTS = "events.out.tfevents.*"
METRICS = "metrics.csv"  # of `uae.loggers.CSV`


def read_curves(folder: Path) -> dict[str, Curve]:
    """All scalars of the run in a folder, by tag. Where a run was continued, what was logged last counts.

    Evaluations and later stages in folders below that of the run are not read.
    """
    found: dict[str, dict[int, float]] = {}
    for file in _files(folder):
        for tag, step, value in _rows(file) if file.name == METRICS else _events(file):
            if math.isfinite(value):
                found.setdefault(tag, {})[step] = value
    return {tag: sorted(points.items()) for tag, points in found.items()}


def labels_of(folder: Path) -> str:
    """The labels of the run in a folder: the name of the folder of its events below its own. Empty if there are none."""
    try:
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["labels"])
    except (OSError, ValueError, KeyError, TypeError):  # written by another program, or not at all
        return ""


def _files(folder: Path) -> list[Path]:
    """Files with scalars, the oldest first."""
    places = dict.fromkeys([folder, folder / labels_of(folder)])
    events = sorted((file for place in places for file in place.glob(EVENTS)), key=lambda file: file.name)  # which begin with the time
    versions = (folder / "csv").glob(f"version_*/{METRICS}")
    return [*events, *sorted(versions, key=lambda file: int(file.parent.name.partition("_")[2]))]


def _events(file: Path) -> Iterator[tuple[str, int, float]]:
    loader: Any = import_module("tensorboard.backend.event_processing.event_file_loader")  # takes a second, and has no types
    for event in loader.LegacyEventFileLoader(str(file)).Load():
        for value in event.summary.value:
            if value.HasField("simple_value"):
                yield value.tag, event.step, value.simple_value


def _rows(file: Path) -> Iterator[tuple[str, int, float]]:
    with file.open(newline="", encoding="utf-8") as lines:
        for row in csv.DictReader(lines):
            step = int(row.pop("step"))
            yield from ((tag, step, float(value)) for tag, value in row.items() if value)
