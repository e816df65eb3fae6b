"""The images a process could not read: counted in memory, named in a file beside the run's logs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path


class Skipped(dict[str, str]):
    """Name to reason. Once it has a folder, every entry becomes a line ``{"name": ..., "reason": ...}`` of a file.

    A name is written once, also when a run is resumed. A file that cannot be written costs a warning and not the run.
    """

    file: Path | None = None
    _cut = False  # the file's last line is not whole

    def __setitem__(self, name: str, reason: str) -> None:
        """Count and, if there is a file, write."""
        super().__setitem__(name, reason)
        self._write({name: reason})

    def write_to(self, folder: str | Path, rank: int) -> None:
        """From now on write ``skipped.rank<rank>.jsonl`` there, beginning with what has been counted so far."""
        self.file, self._written = Path(folder, f"skipped.rank{rank}.jsonl"), set[str]()
        if self.file.is_file():
            text = self.file.read_text(encoding="utf-8", errors="replace")
            self._cut = bool(text) and not text.endswith("\n")
            for line in text.splitlines():
                try:
                    self._written.add(json.loads(line)["name"])
                except (ValueError, KeyError, TypeError):  # a line that a killed run left half written
                    continue
        self._write(dict(self))

    def _write(self, rows: dict[str, str]) -> None:
        if self.file is None:
            return
        lines = [{"name": name, "reason": rows[name]} for name in rows if name not in self._written]
        self._written |= set(rows)
        if not lines:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as out:
                out.write("\n" * self._cut)
                self._cut = False
                out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        except OSError as error:
            warnings.warn(f"{self.file} cannot be written ({error}): skipped images go unnamed", stacklevel=2)
