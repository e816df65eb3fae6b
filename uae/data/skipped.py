"""The images that a process left out, in a file beside the logs of the run."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from uae.data.tally import Tally, total
from uae.files.folders import shown
from uae.files.lines import lines_of


class Skipped(dict[str, str]):
    """The names of unreadable images and the reasons.

    After `write_to`, every new entry becomes a line ``{"name": ..., "reason": ...}`` of a file. A name is written once, also
    when a run is resumed. If the file cannot be written, there is a warning, and the run goes on.
    """

    file: Path | None = None
    _cut = False  # whether the last line of the file is not whole

    def __init__(self) -> None:
        super().__init__()
        self._shards: dict[str, Tally] = {}

    def __setitem__(self, name: str, reason: str) -> None:
        """Add an entry, and write it if there is a file."""
        super().__setitem__(name, reason)
        self.write({name: reason})

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
        self.write(dict(self))

    def count(self, shards: dict[str, Tally]) -> None:
        """Keep what was found in shards, by their names. Of a shard that is read again, the longest reading counts."""
        for name, tally in shards.items():
            before = self._shards.get(name)
            if before is None or before.found <= tally.found:
                self._shards[name] = tally

    def report(self) -> str:
        """One line on what this process has found and skipped while it read; empty if there is nothing to say.

        What shards left out on purpose is written to the file: for each shard and reason, one name.
        """
        self.write({
            name: f"{reason} ({tally.skipped[reason]} in this shard)"
            for tally in self._shards.values()
            for name, reason in tally.names.items()
        })  # fmt: skip
        if self._shards:
            whole = total(list(self._shards.values()), "images and other members")
            whole.leave_out(sum("/" in name for name in self), "unreadable")  # names of broken shards have no slash
            return f"in {len(self._shards)} shards that were read: {whole}, see {self.file}"
        return f"{len(self)} unreadable images skipped, see {self.file}" if self else ""

    def write(self, rows: dict[str, str]) -> None:
        """Write names and reasons to the file, if there is one, without counting them as unreadable."""
        if self.file is None:
            return
        lines = [{"name": shown(name), "reason": rows[name]} for name in rows if shown(name) not in self._written]
        self._written |= {line["name"] for line in lines}
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
