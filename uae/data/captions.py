"""Captions beside images: ``<stem>.txt`` next to the file, or ``metadata.jsonl`` as Hugging Face's ``imagefolder``."""

from __future__ import annotations

import json
from pathlib import Path

METADATA = "metadata.jsonl"


class CaptionFiles:
    """The captions of a folder of images, looked up by the images' relative names.

    A text file beside an image goes before metadata; of several ``metadata.jsonl`` the one nearest to the image counts.
    Its lines are ``{"file_name": ..., "text": ...}``, with names relative to its own folder; other keys are ignored.

    Args:
        root: The folder.
        key: Of the configuration, for errors: the setting that names the folder.
    """

    def __init__(self, root: str | Path, key: str = "data.root") -> None:
        self.root, self.key = Path(root).expanduser(), key
        self._tables: dict[Path, dict[str, str]] = {}  # folder below root to the table in it

    def __getitem__(self, name: str) -> str | None:
        """The caption of an image, stripped; None if there is none. An empty caption is none."""
        beside = (self.root / name).with_suffix(".txt")
        if beside.is_file():
            return beside.read_text(encoding="utf-8-sig").strip() or None
        file = Path(name)
        for folder in file.parents:
            text = self._table(folder).get(file.relative_to(folder).as_posix())
            if text is not None:
                return text
        return None

    def _table(self, folder: Path) -> dict[str, str]:
        """A folder's own table, read once; empty where there is none."""
        if folder not in self._tables:
            file = self.root / folder / METADATA
            self._tables[folder] = self._read(file) if file.is_file() else {}
        return self._tables[folder]

    def _read(self, file: Path) -> dict[str, str]:
        table = {}
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                    name, text = Path(row["file_name"]).as_posix(), row.get("text")
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise ValueError(
                        f"{file}, line {number} is no JSON object with file_name and text ({type(error).__name__}): correct "
                        f"it, or {self.key}"
                    ) from error
                if isinstance(text, str) and text.strip():
                    table[name] = text.strip()
        return table
