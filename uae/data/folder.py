"""A folder of images."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

from uae.data.captions import METADATA, TEXT, Caption, CaptionFiles
from uae.data.source import NO_CAPTION, Item, PictureSource
from uae.data.tally import Tally
from uae.files.folders import Listing, list_files, shown
from uae.files.pictures import SUFFIXES, Reading

__all__ = ["FolderSource", "find_images", "list_images"]


def find_images(root: str | Path, key: str) -> Listing:
    """All images in a folder and its subfolders, and why the other files are skipped. Files of captions are neither.

    Args:
        root: The folder.
        key: The setting of the configuration that names the folder, for errors.

    Raises:
        FileNotFoundError: There is no such folder, or there is no image in it.
    """
    found = list_files(root, key, SUFFIXES, _holds_captions)
    if not found.names:
        skipped = Tally(0, "files").skip(found.skipped)
        raise FileNotFoundError(f"{key}={str(root)!r} holds no image ({', '.join(sorted(SUFFIXES))}) but {skipped}: correct {key}")
    return found


def list_images(root: str | Path, key: str) -> list[str]:
    """The sorted names of all images in a folder, see `find_images`."""
    return find_images(root, key).names


def _holds_captions(name: str, stems: set[str]) -> bool:
    file = PurePosixPath(name)
    return name == METADATA or (file.suffix.lower() == TEXT and file.stem in stems)


class FolderSource(PictureSource):
    """Files of a folder.

    Args:
        root: The folder.
        names: The names of the files, relative to the folder.
        reading: How pictures are read.
        role: The prefix of the names in ids, see `PictureSource`.
        replace: Whether another image takes the place of an unreadable one, see `PictureSource`.
        captions: The captions of the images; None if they have none.
        captioned: Whether an image without a caption counts as unreadable.
    """

    def __init__(
        self,
        root: str,
        names: list[str],
        reading: Reading,
        role: str = "",
        replace: bool = False,
        captions: CaptionFiles | None = None,
        captioned: bool = False,
    ) -> None:
        super().__init__(reading, role, replace, captioned)
        self.root, self.names, self.captions = root, names, captions

    def __len__(self) -> int:
        """The number of files."""
        return len(self.names)

    def name(self, position: int) -> str:
        """The name of a file, relative to the folder."""
        return shown(self.names[position])

    def item(self, position: int) -> Item:
        """A file and its caption."""
        name = self.names[position]
        return Item(shown(name), Path(self.root).expanduser() / name, self.caption(name))

    def caption(self, name: str) -> Caption:
        """The caption of a file, or None if it has none."""
        return None if self.captions is None else self.captions[name]

    def without_caption(self) -> dict[str, str]:
        """The names of the files whose captions are missing or cannot be read, with the reasons."""
        found = ((name, self.caption(name)) for name in self.names)
        return {name: str(caption or NO_CAPTION) for name, caption in found if not isinstance(caption, str)}
