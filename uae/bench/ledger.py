"""Answers of a slow model, kept line by line: a killed run continues where it stopped, and rules can be applied without the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from uae.files.lines import lines_of, text_of


class Ledger:
    """A JSON Lines file: a header that names the model which makes the rows, then one row per case.

    A line that a killed process left half-written is cut off. If a key has several rows, the last one counts.

    Args:
        path: Path of the file; it is created with the first row.
        header: Description of the model that makes the rows. None takes the header of the file.

    Raises:
        FileNotFoundError: No header is given and the file does not exist.
        ValueError: The file is not a ledger, or another model made its rows.
    """

    def __init__(self, path: str | Path, header: dict[str, Any] | None = None) -> None:
        self.path = Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path.is_file() and self.path.stat().st_size:
            self.header = self._read()
            if header is not None and header != self.header:
                differing = sorted(key for key in {*header, *self.header} if header.get(key) != self.header.get(key))
                raise ValueError(
                    f"{str(path)!r} was made by {self._said(self.header, differing)}, now it is {self._said(header, differing)}; "
                    "give another file, or the same models"
                )
        elif header is None:
            raise FileNotFoundError(f"no file {str(path)!r}; give the file that an earlier run wrote")
        else:
            self.header = header

    def add(self, key: str, **row: Any) -> None:
        """Append a row to the file; the row of a key that has one already is replaced.

        Args:
            key: Name of the case.
            **row: What the model said about it, as JSON values.
        """
        new = not self.path.is_file() or not self.path.stat().st_size
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            if new:
                file.write(json.dumps({"made_by": self.header}, ensure_ascii=False) + "\n")
            file.write(json.dumps({"key": key, **row}, ensure_ascii=False) + "\n")
        self.rows[key] = row

    def _read(self) -> dict[str, Any]:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        try:
            first, *rest = [json.loads(line) for line in lines_of(text_of(whole))] or [{}]
            for row in rest:
                self.rows[row.pop("key")] = row
            return dict(first["made_by"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{str(self.path)!r} is not a file of an earlier run: its first line must be {{"made_by": {{...}}}}, the others '
                f'{{"key": ..., ...}} ({type(error).__name__} {error})'
            ) from error

    @staticmethod
    def _said(header: dict[str, Any], keys: list[str]) -> str:
        return ", ".join(f"{key}={header.get(key)}" for key in keys)
