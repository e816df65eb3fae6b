"""WebDataset shards: tar files, here or behind a URL, read as a stream.

Members are never extracted, only the bytes of images and captions are taken, within limits. So links, devices, absolute names
and names with ``..`` lead nowhere, and a member may declare any size.
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
    """``a-{000..012}.tar`` written out; several ranges multiply."""
    found = RANGE.search(pattern)
    if not found:
        return [pattern]
    first, last = found.groups()
    numbers = [f"{number:0{len(first)}}" for number in range(int(first), int(last) + 1)]
    return [name for number in numbers for name in expand(pattern.replace(found.group(), number, 1))]


def list_shards(root: str, key: str) -> tuple[str, list[str]]:
    """The folder (or URL) of the shards and their names relative to it.

    ``root`` is a folder, a file, or either with ``*`` or ``{000..123}`` in its last part. Only patterns with ``*`` and folders
    are listed; ranges and URLs are taken as they are, so that a missing shard is found out when it is read.

    Raises:
        FileNotFoundError: Nothing there; the message names the configuration ``key``.
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
    """A member's name as a relative one that stays where it is put."""
    parts = PurePosixPath(name.replace("\0", "").replace("\\", "/")).parts
    return "/".join(part for part in parts if part not in ("/", "//", "..", ".")) or "image"


class TarShards:
    """Tar files whose members come in groups: ``<key>.jpg`` beside ``<key>.txt``.

    Args:
        folder: Where they are: a folder or a URL that fsspec knows.
        names: Of the files, relative to it.
        max_file_bytes: Larger members are passed over.
        caption: Suffix of the member that holds an image's caption.
    """

    def __init__(self, folder: str, names: list[str], max_file_bytes: int, caption: str = "txt") -> None:
        self.folder, self.names, self.max_file_bytes, self.caption = folder, names, max_file_bytes, caption

    def __len__(self) -> int:
        """Number of shards."""
        return len(self.names)

    def name(self, shard: int) -> str:
        """A shard's file name."""
        return self.names[shard]

    def items(self, shard: int) -> Iterator[Item]:
        """A shard's images in order, with their captions."""
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
        """The first image of a group with its caption. If the archive breaks off behind it, it still counts."""
        item, caption = None, None
        try:
            for name, size, take in group:
                suffix = _split(name)[1]
                if suffix == self.caption and size <= LONGEST_TEXT:
                    caption = take().decode("utf-8-sig", "replace").strip() or None
                elif not item and f".{suffix.rpartition('.')[2].lower()}" in SUFFIXES:
                    item = Item(f"{shard}/{inside(name)}", self._content(size, take))
        except Exception as error:  # ours, or of the decompression
            return item and item._replace(caption=caption), error
        return item and item._replace(caption=caption), None

    def _content(self, size: int, take: Take) -> bytes | UnreadableImageError:
        if size > self.max_file_bytes:
            return UnreadableImageError(f"{size} bytes are above max_file_bytes={self.max_file_bytes}")
        return take()


Member: TypeAlias = "tuple[str, int, Take]"


class Take:
    """Reads the data of one member, once, if it is asked to."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.left, self.padding = file, size, -size % BLOCK

    def __call__(self) -> bytes:
        """All of it."""
        content = self.file.read(self.left)
        self.left -= len(content)
        if self.left:
            raise ValueError("the archive ends in the middle of a member")
        return content

    def skip(self) -> None:
        """Go to the next member."""
        left = self.left + self.padding
        while left:
            passed = len(self.file.read(min(left, 2**16)))
            if not passed:
                raise ValueError("the archive ends in the middle of a member")
            left -= passed


def members(file: BinaryIO) -> Iterator[Member]:
    """Name, size and data of the regular files of a tar stream; everything else in it is passed over.

    Python's own reader allocates whatever an extended header says it needs.

    Raises:
        ValueError: It is corrupted or truncated; what came before is good.
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
    """Group and suffix of a member: ``a/b.seg.png`` is ``seg.png`` of ``a/b``; hidden files have no suffix."""
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}", suffix if stem else ""


def _extended(records: bytes) -> dict[str, str]:
    """The records ``<length> <key>=<value>`` and a line feed of a POSIX extended header."""
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
