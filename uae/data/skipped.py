"""The images that a process could not read, in a file beside the logs of the run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from uae.files.lines import lines_of


class Skipped(dict[str, str]):
    """The names of unreadable images and the reasons.

    After `write_to`, every new entry becomes a line ``{"name": ..., "reason": ...}`` of a file. A name is written once, also
    when a run is resumed. If the file cannot be written, there is a warning, and the run goes on.
    """

    file: Path | None = None
    _cut = False  # whether the last line of the file is not whole

    def __setitem__(self, name: str, reason: str) -> None:
        """Add an entry, and write it if there is a file."""
        super().__setitem__(name, reason)
        self._write({name: reason})

    def write_to(self, folder: str | Path, rank: int) -> None:
        """Write all entries, those that are there and those to come, to ``skipped.rank<rank>.jsonl`` in a folder."""
        self.file, self._written = Path(folder, f"skipped.rank{rank}.jsonl"), set[str]()
        if self.file.is_file():
            text = self.file.read_bytes().decode(errors="replace")
            self._cut = bool(text) and not text.endswith("\n")
            for line in lines_of(text):
                try:
                    self._written.add(json.loads(line)["name"])
                except (ValueError, KeyError, TypeError):  # a run that was killed has written half of this line
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
            warnings.warn(f"{self.file} cannot be written ({error}): skipped images are not named there", stacklevel=2)
