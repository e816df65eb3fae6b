"""What every benchmark writes: one JSON file that says what was measured, on what, with what, and how surely."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, TypedDict

from uae.files.whole import write_whole
from uae.metrics.intervals import Interval

VERSIONED = ("torch", "transformers", "diffusers", "open_clip_torch")


class Score(TypedDict, total=False):
    """A number between its limits. ``n`` cases; ``low`` and ``high`` are the ends of the 95 % interval."""

    value: float
    n: int
    low: float
    high: float


def score(interval: Interval, n: int) -> Score:
    """An `Interval` as it is written."""
    return {"value": interval.value, "n": n, "low": interval.low, "high": interval.high}


def check_output(path: str | Path) -> None:
    """Refuse before hours of work what could not be written after them.

    Raises:
        ValueError: It is a folder, has another suffix than .json, or nothing can be written beside it.
    """
    target = Path(path)
    if target.suffix != ".json" or target.is_dir():
        raise ValueError(f"--output {str(path)!r}: allowed: a file that ends in .json; correct --output")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=target.parent):
            pass
    except OSError as error:
        raise ValueError(f"--output {str(path)!r} cannot be written ({error.strerror}); correct --output") from error


def write_result(
    path: str | Path,
    benchmark: str,
    system: str,
    scores: dict[str, Score],
    backend: dict[str, Any],
    inputs: dict[str, str],
    **more: Any,
) -> dict[str, Any]:
    """Write a result file, whole or not at all, and return its content.

    Args:
        path: Of the file; its folder is made.
        benchmark: What was measured, with its variant, as "unified_bench_1" or "geneval (rewritten)": only results of
            equal name are compared.
        system: What was measured: a name of the user's.
        scores: Shares and cosines in [-1, 1]; times 100 only in reports. The headline comes first.
        backend: What measured: checkpoints, revisions, thresholds, versions of prompts.
        inputs: Name to sha256 of what was read.
        **more: Anything else, as the official layout of a benchmark.
    """
    content: dict[str, Any] = {
        "benchmark": benchmark,
        "system": system,
        "scores": scores,
        "backend": backend,
        "inputs": inputs,
        "versions": {name: metadata.version(name) for name in VERSIONED} | {"uae": metadata.version("uae")},
        **more,
    }
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(Path(path), text.encode())
    return content


def read_result(path: str | Path) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is not one.
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
