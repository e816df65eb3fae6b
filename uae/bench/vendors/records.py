"""Records of paid calls in a JSON Lines file that is only appended to; each line is on the disk before the next call is made."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class Records:
    """The records of all requests, by the requests' keys; ``cost_usd`` of a record is what its call has cost.

    Args:
        path: Path of the file; it need not exist. Lines that a crash left incomplete are ignored.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: BinaryIO | None = None
        self._load()

    def append(self, **record: Any) -> None:
        """Append a record; it is on the disk when this returns. Only within `writing`."""
        assert self._file is not None, "records are appended while writing() is entered"
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record["key"]].append(record)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the lock of the file, within which `append` may be called.

        Raises:
            ValueError: Another run holds the lock; two runs would pay for the same requests twice.
        """
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"another run is writing {str(self.path)!r}; wait for it, or give this one a file of its own") from None
        try:
            self._load()  # another run may have appended before this one got the lock
            with self.path.open("ab") as file:
                if self.path.stat().st_size and not self._whole():
                    file.write(b"\n")
                self._file = file
                yield
        finally:
            self._file = None
            lock.release()

    def spent(self, keys: Iterable[str]) -> float:
        """Cost of some requests so far, in USD; a call without an answer counts with the most it can have cost."""
        return sum(record["cost_usd"] for key in set(keys) for record in self.records.get(key, ()))

    def _load(self) -> None:
        self.records: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.torn = 0
        for line in self.path.read_bytes().split(b"\n") if self.path.exists() else []:
            try:
                record = json.loads(line)
                self.records[record["key"]].append({"cost_usd": 0.0, **record})
            except (ValueError, KeyError, TypeError):
                self.torn += bool(line.strip())

    def _whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
