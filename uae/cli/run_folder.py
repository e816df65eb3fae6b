"""Which folder a run writes to. No two runs write to one folder, neither one after the other nor at the same time."""

from __future__ import annotations

import json
import re
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from filelock import FileLock, Timeout

from uae.checkpoints.files import newest, step_of

RECORD = "run.json"  # made when a run takes a folder: whose folder it is
LOCK = ".lock"
OF_THE_START = (RECORD, LOCK, "config.yaml", "hparams.yaml", "events.out.tfevents.*")  # what a run writes before its first step
RESULTS = ("summary.json", "checkpoints", "export", "cold_start", "predictions")
PATIENCE = 10.0  # seconds; the data-loading processes of a killed run end within 5


@dataclass(frozen=True)
class Labels:
    """What makes a run different from others of its name. TensorBoard shows the labels behind the name of the run.

    The files of ``configs/`` that change what a run is set their own label; ``note`` is free for the user.

    Args:
        finetune: What trains, as in ``full``.
        stage: Which stage of the method this is, as in ``joint``.
        reward: What a reconstruction is worth, as in ``random``.
        loss: How the policy learns from advantages, as in ``cispo``.
        note: A word of the user's, as in ``lr3e-4``.
    """

    finetune: str | None = None
    stage: str | None = None
    reward: str | None = None
    loss: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        """Refuse labels that would not be the name of one folder."""
        for field, label in asdict(self).items():
            if label is not None and not re.fullmatch(r"[\w.+=,-]*\w[\w.+=,-]*", label):
                raise ValueError(f"label.{field}={label!r}; allowed: letters, digits and . _ + = , -")

    def __str__(self) -> str:
        """All labels in one word, joined by hyphens; empty if there are none."""
        return "-".join(label for label in asdict(self).values() if label)


class FolderInUseError(ValueError):
    """Another process writes to the folder."""


@dataclass(frozen=True)
class Runs:
    """The runs of one name: ``<root>/<name>``, then ``<root>/<name>-2``, ``<root>/<name>-3`` and so on.

    Args:
        root: Folder of all runs.
        name: Name of the run, which may have slashes.
        labels: Labels of the run in one word, or an empty string. Runs with other labels are numbered together, but
            ``last`` never continues one of them.
    """

    root: Path
    name: str
    labels: str = ""

    @property
    def first(self) -> Path:
        """The folder of the first run of this name."""
        return self.root / self.name

    def folders(self) -> Iterator[Path]:
        """The folders that runs of this name have or may have, in the order in which they are taken."""
        yield self.first
        for number in count(2):
            yield self.root / f"{self.name}-{number}"

    def existing(self) -> list[Path]:
        """The folders of runs with this name and these labels, the newest last."""
        numbered = re.compile(re.escape(self.first.name) + r"(?:-(\d+))?")
        beside = sorted(self.first.parent.iterdir()) if self.first.parent.is_dir() else []
        found = []
        for path in filter(taken, beside):
            match, started = numbered.fullmatch(path.name), self._started(path)
            if match and started is not None:
                found.append((started, int(match[1] or 1), path))
        return [path for _, _, path in sorted(found)]

    def start(self) -> Path:
        """Take the first folder that is free. Processes that do this at the same time get different folders."""
        for folder in self.folders():
            if taken(folder):
                continue
            folder.mkdir(parents=True, exist_ok=True)
            try:
                with (folder / RECORD).open("x", encoding="utf-8") as file:
                    started = time.strftime("%Y-%m-%d %H:%M:%S")
                    json.dump({"run_name": self.name, "labels": self.labels, "started": started}, file)
            except FileExistsError:  # another process was faster
                continue
            return folder
        raise AssertionError("there is always another number")

    def continued_by(self, checkpoint: str | None) -> Path | None:
        """The folder in which a run goes on that starts from a checkpoint; None if it is a new run.

        ``last`` continues the newest run with this name and these labels. A file continues the run in whose folder it lies, if
        that run has this name and these labels and the file is its furthest checkpoint. From an earlier checkpoint a new run
        branches off, because it would overwrite the later ones.
        """
        if checkpoint is None:
            return None
        if checkpoint == "last":
            return next(reversed(self.existing()), None)
        folder = self.of(checkpoint)
        if folder is None:
            return None
        furthest = newest(folder / "checkpoints")
        return folder if furthest is None or step_of(Path(checkpoint)) >= step_of(furthest) else None

    def evaluated_by(self, checkpoint: str | None) -> Path:
        """The folder below which an evaluation of a checkpoint writes: the one of its run, or else ``first``."""
        run = self.continued_by(checkpoint) if checkpoint in (None, "last") else self.of(checkpoint)
        return run or self.first

    def of(self, checkpoint: str) -> Path | None:
        """The folder of the run with this name and these labels in which a checkpoint file lies, or None."""
        folder = Path(checkpoint).absolute().parent
        return next((one for one in self.existing() if one.absolute() / "checkpoints" == folder), None)

    def _started(self, folder: Path) -> str | None:
        """When the run of a folder began, if it has this name and these labels; else None."""
        record = folder / RECORD
        if not record.is_file():  # checkpoints that were copied here, or a run of an earlier version
            return "" if folder == self.first else None
        try:
            content = json.loads(record.read_text(encoding="utf-8"))
        except ValueError:  # the process was killed while it wrote
            return None
        return content["started"] if (content["run_name"], content["labels"]) == (self.name, self.labels) else None


def taken(folder: Path) -> bool:
    """Whether a run has written to a folder."""
    return any(any(folder.glob(name)) for name in (*OF_THE_START, *RESULTS))


def below(folder: Path, subcommand: str) -> Path:
    """Make a new folder for an evaluation below the folder of a run: ``<folder>/test``, then ``<folder>/test-2`` and so on."""
    for path in Runs(folder, subcommand).folders():
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise AssertionError("there is always another number")


def lock(folder: Path) -> FileLock | None:
    """Reserve the folder of a run for this process, until the lock is released or the process ends.

    Returns:
        The lock; None if the file system has no locks, which is a warning.

    Raises:
        FolderInUseError: Another process has reserved it.
    """
    guard = FileLock(folder / LOCK)
    try:
        guard.acquire(timeout=PATIENCE)
    except Timeout:
        raise FolderInUseError(
            f"another process writes to {str(folder)!r}: wait for its end, or start a new run without ckpt_path"
        ) from None
    except (NotImplementedError, OSError) as error:
        warnings.warn(f"{str(folder)!r} cannot be locked ({error}): do not start two runs there", stacklevel=2)
        return None
    return guard


def give_back(folder: Path, labels: str = "") -> None:
    """Make a folder free again in which a failed run has written nothing but its start. Lists of skipped images stay."""
    if any((folder / name).is_file() or any((folder / name).glob("*")) for name in RESULTS):
        return
    starts = [path for name in OF_THE_START for place in {folder, folder / labels} for path in place.glob(name)]
    for path in starts:
        path.unlink(missing_ok=True)
    for path in (folder / "checkpoints", folder / labels, folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
