"""Captions of a folder of images: in ``<stem>.txt`` beside an image, or in ``metadata.jsonl`` as Hugging Face has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, TypeAlias

from uae.files.lines import read_lines, text_of

METADATA = "metadata.jsonl"
TEXT = ".txt"

Captions: TypeAlias = Literal["needed", "welcome", "unread"]
"""Whether images without a caption are skipped, come without one, or no captions are read at all."""


class UnreadableCaptionError(ValueError):
    """There is a caption, but it cannot be read. The message says why."""


Caption: TypeAlias = "str | UnreadableCaptionError | None"
"""A caption without spaces around it; None if there is none or it is empty."""


def caption_in(content: bytes, place: str) -> Caption:
    """The caption in the bytes of a text file.

    Args:
        content: The bytes.
        place: The name of the file, for the error.
    """
    try:
        return text_of(content).strip() or None
    except ValueError as error:
        return UnreadableCaptionError(f"{place} is no UTF-8 ({error})")


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
        self._broken: dict[Path, str] = {}  # folder below root to what is wrong with its metadata
        self._texts: dict[Path, dict[str, str]] = {}  # folder below root to its text files, by their names without suffix

    def __getitem__(self, name: str) -> Caption:
        """The caption of an image, or the error that it cannot be read."""
        file = Path(name)
        beside = self._beside(file.parent).get(file.stem)
        if beside is not None:
            try:
                return caption_in((self.root / file.parent / beside).read_bytes(), beside)
            except OSError as error:
                return UnreadableCaptionError(f"{beside} cannot be read ({error})")
        broken = None
        for folder in file.parents:
            text = self._table(folder).get(file.relative_to(folder).as_posix())
            if text is not None:
                return text
            broken = broken or self._broken.get(folder)
        return UnreadableCaptionError(broken) if broken else None

    def _beside(self, folder: Path) -> dict[str, str]:
        """The text files in a folder, listed once. Their suffix may be in capitals; ``.txt`` is preferred."""
        if folder not in self._texts:
            place = self.root / folder
            files = sorted(place.iterdir()) if place.is_dir() else []
            self._texts[folder] = {file.stem: file.name for file in files if file.suffix.lower() == TEXT}
        return self._texts[folder]

    def _table(self, folder: Path) -> dict[str, str]:
        """What the metadata in a folder say, read once; empty where there are none."""
        if folder not in self._tables:
            file = self.root / folder / METADATA
            self._tables[folder] = self._read(file, folder) if file.is_file() else {}
        return self._tables[folder]

    def _read(self, file: Path, folder: Path) -> dict[str, str]:
        """The captions of a file. One line that is wrong costs the caption of one image, not those of the others."""
        table = {}
        try:
            lines = read_lines(file)
        except (OSError, ValueError) as error:
            self._broken[folder] = f"{file} cannot be read ({error}): correct it, or {self.key}"
            return {}
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = Path(row["file_name"]).as_posix(), row.get("text")
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                self._broken.setdefault(
                    folder,
                    f"{file}, line {number} is no JSON object with file_name and text ({type(error).__name__}): correct "
                    f"it, or {self.key}",
                )
                continue
            if isinstance(text, str) and text.strip():
                table[name] = text.strip()
        return table
