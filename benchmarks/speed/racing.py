"""Races: contestants compute the same thing in turns, in one run, and medians of their CPU seconds are compared.

CPU seconds, because another program on the machine then disturbs less; in turns, because what still disturbs meets all.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from results import write  # noqa: E402

__all__ = ["alone", "forget_peak", "in_turns", "peak", "report", "surroundings", "table", "write"]
LIBRARIES = ("torch", "transformers", "diffusers", "peft", "lightning", "trl")


def in_turns(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every contestant in every round. One more round comes before them and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name in sorted(contestants, reverse=bool(number % 2)):
            start = time.process_time()
            contestants[name]()
            if number:
                seconds[name].append(time.process_time() - start)
    return seconds


def peak() -> float:
    """The largest resident memory of this process since its start or the last `forget_peak`, in MiB."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def forget_peak() -> float:
    """Measure `peak` anew: what was taken for a moment, by imports for example, no longer counts. The memory now, in MiB."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


def alone(file: str, *arguments: str) -> Any:
    """What a script prints as JSON in its last line, run in a process of its own on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, file, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def surroundings() -> dict[str, Any]:
    """Machine, versions and revision that a measurement belongs to."""
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    revision = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    machine = f"{(names or [platform.processor()])[0]}, {len(os.sched_getaffinity(0))} cores, one thread"
    return {"machine": machine, "python": platform.python_version(), "versions": versions, "revision": revision}


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table. Numbers are written with three digits."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return [*lines, *("| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows)]


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def report(name: str, command: str, text: Sequence[str], found: Any) -> None:
    """Write ``benchmarks/results/speed_<name>.json`` and ``.md``, and print the second."""
    around = surroundings()
    versions = ", ".join(f"{library} {version}" for library, version in around["versions"].items())
    lines = [f"`{command}`; medians of CPU seconds, contestants in turns.", "", *text, ""]
    lines += [f"{around['machine']}; Python {around['python']}, {versions}; revision {around['revision']}."]
    write(f"speed_{name}", {**around, "found": found}, "\n".join(lines))
    print("\n".join(lines), flush=True)


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)
