"""Two systems on the same cases: the difference of every score that can be paired, with its interval."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uae.bench.score.comparison import paired_difference
from uae.metrics.intervals import bootstrap, mean_of_means

Result = dict[str, Any]
Cases = dict[str, tuple[float, str]]  # of one group: case to value and cluster
BENCHMARKS_OWN = ("questions", "prompts", "prompt", "judges", "csv")  # inputs that are not the system's
ABOUT_THE_MACHINE = ("device",)


class Difference(NamedTuple):
    """Ours minus the other's, in the scores' units.

    Args:
        value, low, high: The mean and its 95 % interval; without pairs the ends are None.
        n: Cases in common.
        p: Of McNemar's exact test, two-sided, where cases are right or wrong and independent.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int = 0
    p: float | None = None


def differences(ours: Result, other: Result, ours_file: Path, other_file: Path) -> tuple[dict[str, Difference], list[str]]:
    """Of all scores that both have, and what the reader must know.

    Nothing is subtracted where the two were measured differently.

    Args:
        ours: A result.
        other: Of the same benchmark.
        ours_file: Where it lies; GenEval keeps its cases in a file beside it.
        other_file: As well.
    """
    unlike = unlikeness(ours, other)
    if unlike:
        return {}, [f"{ours['system']} and {other['system']} are not compared: {'; '.join(unlike)}"]
    if "per_image" in ours and "per_image" in other:
        try:
            rows = paired_difference(ours, other)
        except ValueError as error:
            return {}, [f"{ours['system']} and {other['system']} are not compared: {error}"]
        return {name: Difference(row["value"], row["low"], row["high"], row["n"]) for name, row in rows.items()}, _coverage(ours, rows)
    found = {
        name: Difference(score["value"] - other["scores"][name]["value"])
        for name, score in ours["scores"].items()
        if name in other["scores"]
    }
    mine, its = cases(ours, ours_file), cases(other, other_file)
    paired = {name: _paired(mine[name], its[name]) for name in mine if name in its and name in found}
    found |= {name: one for name, one in paired.items() if one is not None}
    notes = [] if paired else [f"{ours['system']} and {other['system']} have no cases to pair: differences without interval"]
    fewer = {one.n for name, one in paired.items() if one and one.n < ours["scores"][name]["n"]}
    return found, [*notes, *([f"{ours['system']} and {other['system']} share only some cases"] if fewer else [])]


def unlikeness(ours: Result, other: Result) -> list[str]:
    """Why two results of one benchmark cannot be subtracted: other encoders, judges, detectors, prompts, questions."""
    mine, its = (result.get("backend", {}) for result in (ours, other))
    if "encoders" in mine and "encoders" in its:  # compared by the fingerprints of their weights, see comparison
        mine = its = {}
    names = [name for name in sorted({*mine, *its}) if name not in ABOUT_THE_MACHINE and mine.get(name) != its.get(name)]
    reasons = [f"other {name} ({_short(mine.get(name))}, {_short(its.get(name))})" for name in names]
    mine, its = (result.get("inputs", {}) for result in (ours, other))
    return reasons + [f"other {name}" for name in BENCHMARKS_OWN if name in mine and name in its and mine[name] != its[name]]


def cases(result: Result, file: Path) -> dict[str, dict[str, Cases]]:
    """Score to group to cases. A score of several groups is the unweighted mean of their means."""
    if "per_case" in result:
        return _answers(result["per_case"], result["scores"])
    if "items" in result:
        return {"overall": {"": {name: (value, name) for name, value in result["items"].items()}}}
    if "verdicts" in result:
        rows = {str(line): (float(verdict == 1), str(line)) for line, verdict in enumerate(result["verdicts"], start=1)}
        return {"correct images": {"": rows}}
    beside = file.with_suffix(".images.jsonl")
    if result["benchmark"].startswith("GenEval") and beside.is_file():
        return _images([json.loads(line) for line in beside.read_text().splitlines()])
    return {}


def _answers(rows: list[dict[str, Any]], scores: dict[str, Any]) -> dict[str, dict[str, Cases]]:
    """Of questions: overall, vanilla, subtasks, and groups (means of subtasks where the result says so)."""
    found: dict[str, dict[str, Cases]] = {"overall": {"": {row["key"]: (row["correct"], row["key"]) for row in rows}}}
    if all("vanilla" in row for row in rows):
        found["vanilla"] = {"": {row["key"]: (row["vanilla"], row["key"]) for row in rows}}
    for row in rows:
        case = {row["key"]: (row["correct"], row["key"])}
        for name in scores:
            if name == row["subtask"]:
                found.setdefault(name, {"": {}})[""].update(case)
            elif row["group"] and name.endswith(f" {row['group']}") and name.split()[0] in ("ability", "domain", "meta-task"):
                group = row["subtask"] if name.startswith("meta-task") else ""
                found.setdefault(name, {}).setdefault(group, {}).update(case)
    return found


def _images(rows: list[dict[str, Any]]) -> dict[str, dict[str, Cases]]:
    """Of GenEval: the mean of the tasks, each task, all images. Images of a prompt belong together."""
    tasks: dict[str, Cases] = {}
    for row in rows:
        tasks.setdefault(row["tag"], {})[row["filename"]] = (float(row["correct"]), row["filename"].split("/")[0])
    everything = {name: case for task in tasks.values() for name, case in task.items()}
    return {"overall": tasks, **{tag: {"": task} for tag, task in tasks.items()}, "correct images": {"": everything}}


def _paired(ours: dict[str, Cases], other: dict[str, Cases]) -> Difference | None:
    groups = []
    for name in ours:
        common = sorted(ours[name].keys() & other.get(name, {}).keys())
        if not common:
            return None
        gap_N = np.array([ours[name][key][0] - other[name][key][0] for key in common], dtype=np.float64)
        groups.append((gap_N, np.array([ours[name][key][1] for key in common])))
    n = sum(len(gap_N) for gap_N, _ in groups)
    interval = mean_of_means(groups) if len(groups) > 1 else bootstrap(groups[0][0], clusters_N=groups[0][1])
    gap_N, cluster_N = groups[0]
    single = len(groups) == 1 and len(np.unique(cluster_N)) == n and set(gap_N) <= {-1.0, 0.0, 1.0}
    p = mcnemar(int((gap_N == 1).sum()), int((gap_N == -1).sum())) if single else None
    return Difference(*interval, n, p)


def mcnemar(better: int, worse: int) -> float:
    """Two-sided exact p-value of ``better`` against ``worse`` changes under equal chances (McNemar 1947)."""
    n = better + worse
    tail = sum(math.comb(n, k) for k in range(min(better, worse) + 1)) / 2**n
    return min(1.0, 2 * tail)


def _coverage(ours: Result, rows: dict[str, Any]) -> list[str]:
    n, of = rows["overall"]["n"], ours["scores"]["overall"]["n"]
    return [f"{ours['system']} is compared on the {n} of its {of} images that both scored"] if n < of else []


def _short(value: Any, say: Callable[[Any], str] = str) -> str:
    text = say(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
