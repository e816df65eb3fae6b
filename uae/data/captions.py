"""Captions of a folder of images: in ``<stem>.txt`` beside an image, or in ``metadata.jsonl`` as Hugging Face has them."""

from __future__ import annotations

import json
from pathlib import Path

from uae.files.lines import read_lines

METADATA = "metadata.jsonl"


class CaptionFiles:
    """The captions of a folder of images, looked up by the names of the images relative to the folder.

    A text file beside an image is preferred to metadata. Of several ``metadata.jsonl`` above an image, the nearest one that
    has a caption for it counts. A line of such a file is ``{"file_name": ..., "text": ...}``: the name is relative to the
    folder that the file is in, and other keys are ignored.

    Args:
        root: The folder of images.
        key: The setting of the configuration that names the folder, for errors.
    """

    def __init__(self, root: str | Path, key: str = "data.init_args.root") -> None:
        self.root, self.key = Path(root).expanduser(), key
        self._tables: dict[Path, dict[str, str]] = {}  # folder below root to what its own metadata say

    def __getitem__(self, name: str) -> str | None:
        """The caption of an image without spaces around it, or None if there is none or it is empty.

        Raises:
            ValueError: A line of the metadata is no JSON object with a name and a text.
        """
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
        """What the metadata in a folder say, read once; empty where there are none."""
        if folder not in self._tables:
            file = self.root / folder / METADATA
            self._tables[folder] = self._read(file) if file.is_file() else {}
        return self._tables[folder]

    def _read(self, file: Path) -> dict[str, str]:
        table = {}
        for number, line in enumerate(read_lines(file), start=1):
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
