"""What a run has left in its folder."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from uae.checkpoints.files import PARTIAL, newest, step_of
from uae.cli.run_folder import LOCK, RECORD, taken
from uae.files.settings import read_settings

Series = list[tuple[int, float]]  # step and value, in the order of steps
EVENTS = "events.out.tfevents.*"


@dataclass(frozen=True)
class Run:
    """A run, as its folder tells.

    Args:
        folder: The folder.
        running: Whether a process holds the folder's lock.
        config: ``config.yaml``; empty if the run has not begun.
        summary: ``summary.json``; empty if the run has not ended.
        scalars: What TensorBoard shows, by tag.
        step: Step of the furthest checkpoint that can be loaded; None if there is none.
        fault: Why no checkpoint can be loaded, although there are some; else empty.
        partial: Names of checkpoints that were being written when the process was killed.
        skipped: Reasons for which images were left out, with their numbers.
        stacks: Names of files in which ranks have written where they hung.
    """

    folder: Path
    running: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    scalars: Mapping[str, Series] = field(default_factory=dict)
    step: int | None = None
    fault: str = ""
    partial: tuple[str, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    stacks: tuple[str, ...] = ()

    def setting(self, key: str, default: Any = None) -> Any:
        """A setting by its dotted key, as it is typed; ``default`` if the configuration has none."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, Mapping) else None
        return default if node is None else node

    def arguments(self, class_path: str) -> dict[str, Any]:
        """The arguments that the configuration gives a callback."""
        given = [one for one in self.setting("trainer.callbacks", ()) if one.get("class_path") == class_path]
        return (given[0].get("init_args") or {}) if given else {}

    def values(self, tag: str) -> list[float]:
        """All values of a tag, in the order of steps."""
        return [value for _, value in self.scalars.get(tag, ())]


def read_run(folder: Path) -> Run:
    """Read the folder of a run.

    Raises:
        FileNotFoundError: There is no such folder, or no run has written to it.
        ValueError: Its ``config.yaml`` or ``summary.json`` cannot be read.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {str(folder)!r}; give the folder of a run, such as outputs/tiny")
    if not taken(folder):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir() and taken(path))
        meant = f"; runs in it: {', '.join(inside)}" if inside else ""
        raise FileNotFoundError(f"{str(folder)!r} is no folder of a run: it has no {RECORD}, config.yaml or events{meant}")
    step, fault = _furthest(folder / "checkpoints")
    return Run(
        folder,
        running=_is_locked(folder / LOCK),
        config=_read(folder / "config.yaml", read_settings),
        summary=_read(folder / "summary.json", lambda path: json.loads(path.read_text(encoding="utf-8"))),
        scalars=_scalars(folder),
        step=step,
        fault=fault,
        partial=tuple(sorted(path.name for path in folder.glob(f"checkpoints/*{PARTIAL}"))),
        skipped=_skipped(folder),
        stacks=tuple(sorted(str(path.relative_to(folder)) for path in folder.glob("stacks/*.txt") if _has_stacks(path))),
    )


def _read(path: Path, read: Any) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = read(path)
    except Exception as error:  # YAML and JSON have errors of their own
        raise ValueError(f"{str(path)!r} cannot be read: {' '.join(str(error).split())}; was the disk full?") from error
    return content if isinstance(content, dict) else {}


def _furthest(folder: Path) -> tuple[int | None, str]:
    """The step of the furthest checkpoint, and why there is none although there are files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of older ones that are damaged
            path = newest(folder)
    except ValueError as error:
        return None, str(error)
    return (None if path is None else step_of(path)), ""


def _has_stacks(path: Path) -> bool:
    """Whether a timer has run out. Until then the file of a rank has the name of the step only."""
    return "Thread 0x" in path.read_text(encoding="utf-8", errors="replace")


def _is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    guard = FileLock(path)
    try:
        guard.acquire(timeout=0)
    except Timeout:
        return True
    except (NotImplementedError, OSError):  # the file system has no locks, or the folder cannot be written
        return False
    guard.release()
    return False


def _scalars(folder: Path) -> dict[str, Series]:
    """The scalars of TensorBoard's files in a folder and in the folder of its labels. A step that was repeated counts once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    record = folder / RECORD
    labels = _read(record, lambda path: json.loads(path.read_text(encoding="utf-8"))).get("labels", "")
    found: dict[str, dict[int, float]] = {}
    for place in dict.fromkeys((folder, folder / labels)):
        if not any(place.glob(EVENTS)):
            continue
        events = EventAccumulator(str(place), size_guidance={"scalars": 0, "images": 1, "compressedHistograms": 1})
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return {tag: sorted(series.items()) for tag, series in found.items()}


def _skipped(folder: Path) -> dict[str, int]:
    counts: dict[str, int] = {}
    for path in sorted(folder.glob("skipped.rank*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                reason = str(json.loads(line)["reason"])
            except (ValueError, KeyError, TypeError):  # half a line of a killed process
                continue
            counts[reason] = counts.get(reason, 0) + 1
    return counts
