"""Answers on disk: one line each, only ever appended, on the disk before anything else is asked."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uae.bench.judging.prompt import Prompt
from uae.bench.judging.requests import JudgeRequest

ASKED_AT_MOST = 2  # an answer that cannot be read is asked for once more


class AnswerCache:
    """Records by key.

    A record is an answer (``text``), an answer of the wrong model (``error``), or a call that may have been paid and whose
    answer never came (``lost``).

    Args:
        path: The file; need not exist. Lines that were torn by a crash are passed over.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file: Any = None
        self._load()

    def append(self, **record: Any) -> None:
        """Keep a record; it is on the disk when this returns."""
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records[record["key"]].append(record)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """While this lasts, nobody else asks.

        Raises:
            ValueError: Somebody does already: two runs would pay twice.
        """
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{self.path}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            lock = None
        if lock is None:
            raise ValueError(f"another run is writing {str(self.path)!r}; wait for it, or give another cache")
        try:
            self._load()  # what another run wrote before the lock was ours
            with self.path.open("ab") as self._file:
                if self.path.stat().st_size and not self._whole():
                    self._file.write(b"\n")
                yield
        finally:
            lock.release()

    def spent(self, keys: Iterable[str]) -> float:
        """USD that requests have cost so far; calls without an answer count with what they can have cost."""
        return sum(record["cost_usd"] for key in set(keys) for record in self.records.get(key, ()))

    def texts(self, key: str) -> list[str]:
        """Answers, oldest first."""
        return [record["text"] for record in self.records.get(key, ()) if "text" in record]

    def answer(self, request: JudgeRequest, prompt: Prompt) -> str | None:
        """What a judge said: one of the prompt's answers, "invalid", or None if there is no answer (yet)."""
        texts = self.texts(request.key)[:ASKED_AT_MOST]
        readable = [answer for text in texts if (answer := prompt.read(text)) is not None]
        return readable[0] if readable else "invalid" if len(texts) == ASKED_AT_MOST else None

    def errors(self, key: str) -> list[str]:
        """Answers that came from another model."""
        return [record["error"] for record in self.records.get(key, ()) if "error" in record]

    def _load(self) -> None:
        self.records: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.torn = 0
        for line in self.path.read_bytes().splitlines() if self.path.exists() else []:
            try:
                record = json.loads(line)
                self.records[record["key"]].append({"cost_usd": 0.0, **record})
            except (ValueError, KeyError, TypeError):
                self.torn += bool(line.strip())

    def _whole(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() == b"\n"
