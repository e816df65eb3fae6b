"""A folder of images."""

from __future__ import annotations

from pathlib import Path

from uae.data.captions import CaptionFiles
from uae.data.source import Item, PictureSource
from uae.files.pictures import SUFFIXES, Reading

__all__ = ["FolderSource", "list_images"]


def list_images(root: str | Path, key: str) -> list[str]:
    """The sorted names of all images in a folder and its subfolders, relative to it. Hidden files are left out.

    Args:
        root: The folder.
        key: The setting of the configuration that names the folder, for errors.

    Raises:
        FileNotFoundError: There is no such folder, or there is no image in it.
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
        names: The names of the files, relative to the folder.
        reading: How pictures are read.
        role: The prefix of the names in ids, see `PictureSource`.
        replace: Whether another image takes the place of an unreadable one, see `PictureSource`.
        captions: The captions of the images; None if they have none.
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
        """The number of files."""
        return len(self.names)

    def name(self, position: int) -> str:
        """The name of a file, relative to the folder."""
        return self.names[position]

    def item(self, position: int) -> Item:
        """A file and its caption."""
        name = self.names[position]
        return Item(name, Path(self.root).expanduser() / name, self.caption(name))

    def caption(self, name: str) -> str | None:
        """The caption of a file, or None if it has none."""
        return None if self.captions is None else self.captions[name]

    def without_caption(self) -> list[str]:
        """The names of the files that have no caption."""
        return [name for name in self.names if self.caption(name) is None]
