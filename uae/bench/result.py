"""The result file that every benchmark writes: one JSON file with the scores and all that is needed to compare them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypedDict

import numpy as np

from uae.files.whole import write_whole
from uae.metrics.intervals import Interval, bootstrap, mean_of_means, wilson

VERSIONED = ("torch", "transformers", "diffusers", "open_clip_torch")


class Score(TypedDict, total=False):
    """A score over ``n`` cases; ``low`` and ``high`` are the ends of its 95 % confidence interval."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Case:
    """What one case (an image, a question) contributes to a score.

    Args:
        name: Name of the case, the same in the results of all systems, and unique within the score.
        value: Value of the case; the score is the mean of these values.
        cluster: Cases of one cluster (the images of one prompt) are resampled together. Empty: the case is independent.
        group: Group of the case (a task, a subtask). A score whose cases have several groups is the unweighted mean of the
            groups' means.
    """

    name: str
    value: float
    cluster: str = ""
    group: str = ""


def score(interval: Interval, n: int) -> Score:
    """An `Interval` over ``n`` cases as a result file holds it."""
    return {"value": interval.value, "n": n, "low": interval.low, "high": interval.high}


def mean_score(cases: Sequence[Case]) -> Score:
    """The mean of some cases, at least one, with its 95 % interval.

    The interval is Wilson's where cases are 0 or 1 and either independent or all equal (a bootstrap has nothing to draw from
    then), else that of a bootstrap over clusters.
    """
    groups = by_group(cases)
    if len(groups) > 1:
        return score(mean_of_means([_arrays(group) for group in groups.values()]), len(cases))
    value_N, cluster_N = _arrays(cases)
    mean, clusters = value_N.mean(), len(np.unique(cluster_N))
    binary = bool(np.isin(value_N, (0, 1)).all())
    if binary and (clusters == len(cases) or mean in (0, 1)):
        return score(wilson(mean * clusters, clusters), len(cases))
    return score(bootstrap(value_N, clusters_N=cluster_N), len(cases))


def summarize(cases: Mapping[str, Sequence[Case]]) -> dict[str, Score]:
    """`mean_score` of each score's cases, for a benchmark whose scores are all means of cases."""
    return {name: mean_score(some) for name, some in cases.items()}


def by_group(cases: Sequence[Case]) -> dict[str, list[Case]]:
    """Group to its cases, in the order of the groups' first cases."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    return groups


def _arrays(cases: Sequence[Case]) -> tuple[np.ndarray, np.ndarray]:
    """Values and clusters, ``[N]`` each."""
    return np.array([case.value for case in cases], dtype=np.float64), np.array([case.cluster or case.name for case in cases])


def check_output(path: str | Path, option: str = "--output") -> None:
    """Raise before hours of work if their result could not be written.

    Args:
        path: Result file.
        option: The option that names it, for the error.

    Raises:
        ValueError: The path is a folder, does not end in .json, or nothing can be written beside it.
    """
    target = Path(path)
    if target.suffix != ".json" or target.is_dir():
        raise ValueError(f"{option} {str(path)!r}: allowed: a file that ends in .json; correct {option}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"{option} {str(path)!r} cannot be written ({error.strerror}); correct {option}") from error


def write_result(
    path: str | Path,
    benchmark: str,
    system: str,
    scores: Mapping[str, Score],
    backend: Mapping[str, Any],
    inputs: Mapping[str, str],
    cases: Mapping[str, Sequence[Case]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """Write a result file, whole or not at all, and return its content.

    Args:
        path: Path of the file; its folder is created.
        benchmark: What was measured, with its variant, as "unified_bench_1" or "geneval (rewritten)". Only results with
            exactly the same name are compared.
        system: Name of the system that was measured, chosen by the user.
        scores: Name to score, shares and cosines in [-1, 1]; reports multiply by 100. The main score comes first.
        backend: Settings of the measurement: checkpoints, revisions, thresholds, versions of prompts. Results with different
            ones (but for ``device``) are not subtracted.
        inputs: Name to sha256 of what was read. Results are not subtracted if an input that belongs to the benchmark differs
            (`uae.bench.paired.BENCHMARK_INPUTS`).
        cases: Name of a score to the cases whose mean it is. ``report`` pairs two results over them; a score without cases
            has a difference without an interval.
        **more: Everything else the file shall hold, as the official layout of a benchmark.
    """
    content: dict[str, Any] = {
        "benchmark": benchmark,
        "system": system,
        "scores": dict(scores),
        "backend": dict(backend),
        "inputs": dict(inputs),
        "versions": {name: metadata.version(name) for name in VERSIONED} | {"uae": metadata.version("uae")},
        **more,
        "cases": {name: [_written(case) for case in some] for name, some in (cases or {}).items()},
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(Path(path), text.encode())
    return content


def cases_of(result: Mapping[str, Any]) -> dict[str, list[Case]]:
    """Name of a score to its cases, from the content of a result file; empty where a benchmark wrote none."""
    return {name: [Case(**row) for row in rows] for name, rows in result.get("cases", {}).items()}


def read_result(path: str | Path) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a result.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no result at {str(path)!r}; give files that uae.bench wrote")
    try:
        content = json.loads(Path(path).read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"benchmark", "system", "scores"} <= content.keys():
        raise ValueError(f"{str(path)!r} is not a result of uae.bench (benchmark, system, scores)")
    return content


def _written(case: Case) -> dict[str, Any]:
    """A case as JSON; what is empty is left out."""
    return {key: value for key, value in asdict(case).items() if value != ""}
