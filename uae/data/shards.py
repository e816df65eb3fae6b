"""Shards of WebDataset: tar files on this disk or behind a URL, which are read as a stream.

Nothing is extracted to the disk. Only the bytes of images and captions are taken, up to a limit. So links, devices, absolute
names and names with ``..`` have no effect, and a member that claims a huge size costs no memory.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeAlias

from uae.data.captions import Caption, UnreadableCaptionError, caption_in
from uae.data.source import Item, LeftOutError
from uae.files.folders import HIDDEN, Listing, is_hidden, list_files, matching, shown
from uae.files.pictures import SUFFIXES, UnreadableImageError

BLOCK = 512
LONGEST_TEXT = 2**20  # bytes of a caption or of a long member name
LARGEST_SAMPLE = 16  # pictures
SECOND = "another picture of the same sample"
NO_IMAGE = "no image, and beside none"
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
    """The folder (or URL) of the shards, and their names relative to it, see `find_shards`."""
    folder, found = find_shards(root, key)
    return folder, found.names


def find_shards(root: str, key: str) -> tuple[str, Listing]:
    """The folder (or URL) of the shards, and those in it by their names. Subfolders of a folder are not searched.

    Only folders and patterns with ``*`` are listed. Ranges and URLs are taken as they are; whether a shard exists turns out
    when it is read.

    Args:
        root: A folder, a file or a URL, which may have ``*`` or ``{000..123}`` in its last part.
        key: The setting of the configuration that is ``root``, for errors.

    Raises:
        FileNotFoundError: There is no shard.
    """
    import fsspec

    place = Path(root).expanduser()
    folder, _, last = root.rpartition("/")
    if root.strip() and place.is_dir():
        folder, found = root, list_files(root, key, {".tar"})
        found.skipped |= {name: "in a subfolder" for name in found.names if "/" in name}
        found.names = [name for name in found.names if "/" not in name]
    elif "://" in root and "*" in last:
        system, path = fsspec.core.url_to_fs(folder)
        found = Listing(sorted(name.rpartition("/")[2] for name in system.glob(f"{path}/{last}")))
    elif "://" in root or (RANGE.search(last) and not place.exists()):
        found = Listing(expand(last))
    else:
        found = matching(place)
    if not found.names or not root.strip():
        raise FileNotFoundError(f"{key}={root!r} holds no shard: point {key} at *.tar, a folder of them or {{000..123}}.tar")
    return folder or ".", found


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
        caption: Suffix of the members that hold captions; None reads none.
    """

    def __init__(self, folder: str, names: list[str], max_file_bytes: int, caption: str | None = "txt") -> None:
        self.folder, self.names, self.max_file_bytes, self.caption = folder, names, max_file_bytes, caption

    def __len__(self) -> int:
        """The number of shards."""
        return len(self.names)

    def name(self, shard: int) -> str:
        """The file name of a shard."""
        return shown(self.names[shard])

    def items(self, shard: int) -> Iterator[Item]:
        """The images of a shard in order, with their captions, and what is left out as an item with the reason.

        Raises:
            OSError: The shard cannot be read.
            ValueError: The archive is corrupted or breaks off. What comes before that place is good.
        """
        import fsspec

        path = f"{self.folder}/{self.names[shard]}"
        with fsspec.open(path if "://" in path else str(Path(path).expanduser()), "rb", compression="infer") as file:
            yield from self._items(members(file), self.name(shard))

    def _items(self, found: Iterator[Member], shard: str) -> Iterator[Item]:
        sample, names, broken = Sample(""), set[str](), None
        try:
            for name, size, take in found:
                clean = shown(inside(name))
                if Sample.key_of(clean) != sample.key or sample.full:
                    yield from sample.items(shard)
                    sample = Sample(Sample.key_of(clean))
                reason = _left_out(clean, names, take)
                names.add(clean)
                if reason:
                    yield Item(f"{shard}/{clean}", LeftOutError(reason))
                else:
                    sample.add(clean, self._content(clean, size, take))
        except Exception as error:  # raised by `members` and `Take`, or by whatever decompresses
            broken = error
        yield from sample.items(shard)
        if broken:
            raise broken

    def _content(self, name: str, size: int, take: Take) -> bytes | Caption | UnreadableImageError:
        """What `Sample` needs of a member: the bytes of a picture, a caption, or nothing of others."""
        suffix = PurePosixPath(name).suffix.lower()
        if suffix in SUFFIXES:
            if size > self.max_file_bytes:
                return UnreadableImageError(f"{size} bytes are above max_file_bytes={self.max_file_bytes}")
            return take()
        if suffix != f".{self.caption}":
            return None
        if size > LONGEST_TEXT:
            return UnreadableCaptionError(f"{name} has {size} bytes, above {LONGEST_TEXT}")
        return caption_in(take(), name)


class Sample:
    """Adjacent members whose names are equal up to their first dot.

    If one picture has nothing but that key and a suffix, such as ``b.jpg``, it is the image, and other pictures, such as
    ``b.seg.png``, are left out. Otherwise the names merely begin alike, as ``photo.0.png`` and ``photo.1.png`` do, and every
    picture is an image. The caption of an image has the same name but for the suffix, or else the key for a name.

    Args:
        key: The names up to their first dot.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._pictures: dict[str, bytes | UnreadableImageError] = {}
        self._captions: dict[str, Caption] = {}  # by names without suffix
        self._others: list[str] = []

    @staticmethod
    def key_of(name: str) -> str:
        """The name of a member up to the first dot of its last part."""
        folder, _, base = name.rpartition("/")
        return f"{folder}/{base.partition('.')[0]}"

    @property
    def full(self) -> bool:
        """Whether there are more pictures than a sample has, so that no more are kept in memory."""
        return len(self._pictures) >= LARGEST_SAMPLE

    def add(self, name: str, content: bytes | Caption | UnreadableImageError) -> None:
        """Add a member: a picture, a caption, or something else."""
        file = PurePosixPath(name)
        if file.suffix.lower() in SUFFIXES and isinstance(content, bytes | UnreadableImageError):
            self._pictures[name] = content
            return
        self._others.append(name)
        if isinstance(content, str | UnreadableCaptionError):
            self._captions[str(file.with_suffix(""))] = content

    def items(self, shard: str) -> Iterator[Item]:
        """The images of the sample, and what is left out."""
        key = self.key.removeprefix("/")
        plain = next((name for name in self._pictures if str(PurePosixPath(name).with_suffix("")) == key), None)
        for name, content in self._pictures.items():
            stem = str(PurePosixPath(name).with_suffix(""))
            if plain not in (None, name):
                yield Item(f"{shard}/{name}", LeftOutError(SECOND))
            else:
                yield Item(f"{shard}/{name}", content, self._captions.get(stem) or self._captions.get(key))
        for name in self._others if not self._pictures else []:
            yield Item(f"{shard}/{name}", LeftOutError(NO_IMAGE))


def _left_out(name: str, names: set[str], take: Take) -> str | None:
    """Why a member is left out whatever is in it, or None."""
    if any(map(is_hidden, name.split("/"))):
        return HIDDEN
    if not take.regular:
        return "a link or a device"
    return "a second member of this name" if name in names else None


Member: TypeAlias = "tuple[str, int, Take]"


class Take:
    """Reads the data of one member if it is called; `skip` then passes over what is left."""

    def __init__(self, file: BinaryIO, size: int, regular: bool = True) -> None:
        self.file, self.left, self.padding, self.regular = file, size, -size % BLOCK, regular

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
    """Name, size in bytes and data of the files in a tar stream, and of links and devices, which have none.

    Not read by Python's `tarfile`, which allocates as much memory as an extended header claims to need.

    Raises:
        ValueError: The archive is corrupted or breaks off. What comes before that place is good.
    """
    name, size = None, None  # from extended headers, for the member that follows
    while (block := file.read(BLOCK)).strip(b"\0"):
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ValueError(f"the archive is corrupted: {error}") from error
        extended = header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
        length = 0 if header.type in WITHOUT_DATA else header.size if extended or size is None else size
        if length < 0 or header.type == tarfile.GNUTYPE_SPARSE or (extended and length > LONGEST_TEXT):
            raise ValueError(f"the archive has a member of type {header.type!r} and {length} bytes")
        data = Take(file, length, header.isreg())
        if header.type == tarfile.GNUTYPE_LONGNAME:
            name = data().rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif extended:
            fields = _extended(data())
            name, size = fields.get("path", name), int(fields["size"]) if "size" in fields else size
        elif header.type not in (tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK):
            if header.type != tarfile.DIRTYPE:
                yield name or header.name, length, data
            name, size = None, None
        data.skip()


def _extended(records: bytes) -> dict[str, str]:
    """The records of a POSIX extended header, each of which is ``<length> <key>=<value>`` and a line feed."""
    fields, place = {}, 0
    while place < len(records):
        digits = records[place : place + 20].split(b" ")[0]
        length = int(digits)
        key, _, value = records[place + len(digits) + 1 : place + length - 1].partition(b"=")
        fields[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        if length <= len(digits):
            raise ValueError("the archive has a corrupted extended header")
        place += length
    return fields
