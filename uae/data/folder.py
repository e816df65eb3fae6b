"""A folder of images of any size and mode."""

from __future__ import annotations

from pathlib import Path

from uae.data.captions import CaptionFiles
from uae.data.source import Item, PictureSource
from uae.files.pictures import SUFFIXES, Reading, read_picture

__all__ = ["FolderSource", "list_images", "read_picture"]


def list_images(root: str | Path, key: str) -> list[str]:
    """Relative names of the images below a folder, sorted; hidden files are left out.

    Raises:
        FileNotFoundError: The folder is missing or holds no image; the message names the configuration ``key``.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}={str(root)!r} is not a folder: point {key} at a folder of images")
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES]
    names = sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    if not names:
        raise FileNotFoundError(f"{key}={str(root)!r} holds no image ({', '.join(sorted(SUFFIXES))}): correct {key}")
    return names


class FolderSource(PictureSource):
    """Files of a folder.

    Args:
        root: The folder.
        names: Relative names of its files.
        reading: How they are read.
        role: See `PictureSource`, like ``replace``.
        replace: See `PictureSource`.
        captions: Where images have theirs; None for none.
    """

    def __init__(
        self,
        root: str,
        names: list[str],
        reading: Reading,
        role: str = "",
        replace: bool = False,
        captions: CaptionFiles | None = None,
    ) -> None:
        super().__init__(reading, role, replace)
        self.root, self.names, self.captions = root, names, captions

    def __len__(self) -> int:
        """Number of files, unreadable ones included."""
        return len(self.names)

    def name(self, position: int) -> str:
        """The relative name of a file."""
        return self.names[position]

    def item(self, position: int) -> Item:
        """A file and its caption."""
        name = self.names[position]
        return Item(name, Path(self.root).expanduser() / name, self.caption(name))

    def caption(self, name: str) -> str | None:
        """The caption of a file, or None."""
        return None if self.captions is None else self.captions[name]

    def without_caption(self) -> list[str]:
        """Names of the files that have none."""
        return [name for name in self.names if self.caption(name) is None]
