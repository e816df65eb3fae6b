"""Shards of WebDataset: tar files on this disk or behind a URL, which are read as a stream.

Nothing is extracted to the disk. Only the bytes of images and captions are taken, up to a limit. So links, devices, absolute
names and names with ``..`` have no effect, and a member that claims a huge size costs no memory.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias

from uae.data.source import Item
from uae.files.pictures import SUFFIXES, UnreadableImageError

BLOCK = 512
LONGEST_TEXT = 2**20  # bytes of a caption or of a long member name
RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


def expand(pattern: str) -> list[str]:
    """The names that a pattern such as ``a-{000..012}.tar`` stands for. With several ranges, all combinations."""
    found = RANGE.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in expand(pattern.replace(found.group(), number, 1))]


def list_shards(root: str, key: str) -> tuple[str, list[str]]:
    """The folder (or URL) of the shards, and their names relative to it.

    Only folders and patterns with ``*`` are listed. Ranges and URLs are taken as they are; whether a shard exists turns out
    when it is read.

    Args:
        root: A folder, a file or a URL, which may have ``*`` or ``{000..123}`` in its last part.
        key: The setting of the configuration that is ``root``, for errors.

    Raises:
        FileNotFoundError: There is no shard.
    """
    import fsspec

    if "{" not in root and "*" not in root and Path(root).expanduser().is_dir():
        root = f"{root.rstrip('/')}/*.tar"
    folder, _, last = root.rpartition("/")
    names = expand(last)
    if "*" in last:
        system, path = fsspec.core.url_to_fs(str(Path(folder).expanduser()) if "://" not in folder else folder)
        names = sorted(found.rpartition("/")[2] for found in system.glob(f"{path}/{last}"))
    elif "{" not in root and "://" not in root and not Path(root).expanduser().exists():
        names = []
    if not names or not last:
        raise FileNotFoundError(f"{key}={root!r} holds no shard: point {key} at *.tar, a folder of them or {{000..123}}.tar")
    return folder or ".", names


def inside(name: str) -> str:
    """The name of a member without what would lead out of a folder: a leading slash, ``..``, and the like."""
    parts = PurePosixPath(name.replace("\0", "").replace("\\", "/")).parts
    return "/".join(part for part in parts if part not in ("/", "//", "..", ".")) or "image"


class TarShards:
    """Tar files whose members come in groups: ``<key>.jpg`` next to ``<key>.txt``.

    Args:
        folder: The folder of the files, or a URL that fsspec knows.
        names: The names of the files, relative to the folder.
        max_file_bytes: Images with more bytes are not read.
        caption: Suffix of the members that hold captions.
    """

    def __init__(self, folder: str, names: list[str], max_file_bytes: int, caption: str = "txt") -> None:
        self.folder, self.names, self.max_file_bytes, self.caption = folder, names, max_file_bytes, caption

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.names)

    def name(self, shard: int) -> str:
        """The file name of a shard."""
        return self.names[shard]

    def items(self, shard: int) -> Iterator[Item]:
        """The images of a shard in order, with their captions.

        Raises:
            OSError: The shard cannot be read.
            ValueError: The archive is corrupted or breaks off. What comes before that place is good.
        """
        import fsspec

        path = f"{self.folder}/{self.names[shard]}"
        with fsspec.open(path if "://" in path else str(Path(path).expanduser()), "rb", compression="infer") as file:
            for _, group in groupby(members(file), key=lambda member: _split(member[0])[0]):
                item, error = self._item(group, self.names[shard])
                if item:
                    yield item
                if error:
                    raise error

    def _item(self, group: Iterator[Member], shard: str) -> tuple[Item | None, Exception | None]:
        """The first image of a group with its caption, and the error if the archive breaks off inside the group."""
        item, caption = None, None
        try:
            for name, size, take in group:
                suffix = _split(name)[1]
                if suffix == self.caption and size <= LONGEST_TEXT:
                    caption = take().decode("utf-8-sig", "replace").strip() or None
                elif not item and f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES:
                    item = Item(f"{shard}/{inside(name)}", self._content(size, take))
        except Exception as error:  # raised by `Take`, or by whatever decompresses
            return item and item._replace(caption=caption), error
        return item and item._replace(caption=caption), None

    def _content(self, size: int, take: Take) -> bytes | UnreadableImageError:
        if size > self.max_file_bytes:
            return UnreadableImageError(f"{size} bytes are above max_file_bytes={self.max_file_bytes}")
        return take()


Member: TypeAlias = "tuple[str, int, Take]"


class Take:
    """Reads the data of one member if it is called; `skip` then passes over what is left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.padding = file, size, -size % BLOCK

    def __call__(self) -> bytes:
        """All bytes of the member. May be called once.

        Raises:
            ValueError: The archive breaks off before.
        """
        content = self.file.read(self.left)
        self.left -= len(content)
        if self.left:
            raise ValueError("the archive ends in the middle of a member")
        return content

    def skip(self) -> None:
        """Go to the next member.

        Raises:
            ValueError: The archive breaks off before.
        """
        left = self.left + self.padding
        while left:
            passed = len(self.file.read(min(left, 2**16)))
            if not passed:
                raise ValueError("the archive ends in the middle of a member")
            left -= passed


def members(file: BinaryIO) -> Iterator[Member]:
    """Name, size in bytes and data of the regular files in a tar stream. Everything else in it is passed over.

    Not read by Python's `tarfile`, which allocates as much memory as an extended header claims to need.

    Raises:
        ValueError: The archive is corrupted or breaks off. What comes before that place is good.
    """
    name, size = None, None  # from extended headers, for the member that follows
    while (block := file.read(BLOCK)).strip(b"\0"):
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except tarfile.HeaderError as error:
            raise ValueError(f"the archive is corrupted: {error}") from error
        extended = header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        length = 0 if header.type in WITHOUT_DATA else header.size if extended or size is None else size
        if length < 0 or header.type == tarfile.GNUTYPE_SPARSE or (extended and length > LONGEST_TEXT):
            raise ValueError(f"the archive has a member of type {header.type!r} and {length} bytes")
        data = Take(file, length)
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = data().rstrip(b"\0").decode("utf-8", "replace")
        elif extended:
            fields = _extended(data())
            name, size = fields.get("path", name), int(fields["size"]) if "size" in fields else size
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if header.isreg():
                yield name or header.name, length, data
            name, size = None, None
        data.skip()


def _split(name: str) -> tuple[str, str]:
    """Group and suffix of a member: those of ``a/b.seg.png`` are ``a/b`` and ``seg.png``. Hidden files have no suffix."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}", suffix if stem else ""


def _extended(records: bytes) -> dict[str, str]:
    """The records of a POSIX extended header, each of which is ``<length> <key>=<value>`` and a line feed."""
    fields, place = {}, 0
    while place < len(records):
        digits = records[place : place + 20].split(b" ")[0]
        length = int(digits)
        key, _, value = records[place + len(digits) + 1 : place + length - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        if length <= len(digits):
            raise ValueError("the archive has a corrupted extended header")
        place += length
    return fields
