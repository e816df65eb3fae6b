"""Tables with a column of images, read row by row. Parquet files are such tables."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from itertools import accumulate, islice
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from uae.data.source import Item, Items, PictureSource
from uae.files.folders import Listing, list_files, matching, shown
from uae.files.pictures import Reading, UnreadableImageError

SUFFIX = ".parquet"
ROWS = 16  # how many rows are taken from a file at a time


class Columns(NamedTuple):
    """The names of the columns that hold images and captions. Without a name, there are no captions."""

    image: str
    caption: str | None = None

    @property
    def names(self) -> list[str]:
        """The columns to read, that of the images first."""
        return [self.image, self.caption] if self.caption else [self.image]

    def caption_of(self, row: Mapping[str, object]) -> str | None:
        """The caption in a row without spaces around it, the first one if there are several; None if there is none."""
        value = row[self.caption] if self.caption else None
        values = value if isinstance(value, list | tuple) else [value]
        return next((text.strip() for text in values if isinstance(text, str) and text.strip()), None)


def content_of(value: object, root: Path | None) -> bytes | Path | UnreadableImageError:
    """The bytes or the file of an image, or the error that there is neither.

    Args:
        value: The value of the image column in one row: bytes, a path, or ``{"bytes": ..., "path": ...}``.
        root: The folder that paths are relative to, and that they must not leave. None allows no path.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if not isinstance(value, str):
        return UnreadableImageError(f"the row holds {type(value).__name__} where an image should be")
    if root is None:
        return UnreadableImageError(f"the row holds the path {value!r}, and this data set has no folder")
    file = (root / value).resolve()
    if not file.is_relative_to(root.resolve()):
        return UnreadableImageError(f"the path {value!r} leaves the folder of the data set")
    return file


class Table(Items):
    """Rows of images by position."""

    @abstractmethod
    def without_caption(self) -> Iterator[int]:
        """The numbers of the rows whose caption is missing or empty. Only the column of the captions is read."""


class TableSource(PictureSource):
    """Some rows of a table.

    Args:
        table: The table.
        rows: The numbers of the rows.
        reading: How pictures are read.
        role: The prefix of the names in ids, see `PictureSource`.
        replace: Whether another image takes the place of an unreadable one, see `PictureSource`.
        captioned: Whether an image without a caption counts as unreadable.
    """

    def __init__(
        self,
        table: Items,
        rows: Sequence[int],
        reading: Reading,
        role: str = "",
        replace: bool = False,
        captioned: bool = False,
    ) -> None:
        super().__init__(reading, role, replace, captioned)
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.rows)

    def name(self, position: int) -> str:
        """The name of a row in the table."""
        return self.table.name(self.rows[position])

    def item(self, position: int) -> Item:
        """The image and the caption of a row."""
        return self.table.item(self.rows[position])


class ParquetTable(Table):
    """The rows of several Parquet files. The footers are read at once, and rows when they are asked for.

    To reach a row, its row group is decoded from the beginning, a few rows at a time. So row groups of about 100 images make
    random access fast, and no row group is held in memory as a whole.

    Args:
        folder: The folder of the files. Paths in the image column are relative to it, too.
        files: The names of the files, relative to the folder.
        columns: The columns to read.
        key: The setting of the configuration that names the files, for errors.

    Raises:
        ValueError: A file is no Parquet file, or it lacks a column.
    """

    def __init__(self, folder: Path, files: list[str], columns: Columns, key: str = "data.init_args.root") -> None:
        self.folder, self.files, self.columns, self.key = folder, files, columns, key
        self.groups = [(file, group, rows) for file in files for group, rows in enumerate(self._footer(file))]
        self.starts = [0, *accumulate(rows for *_, rows in self.groups)]
        sizes = dict.fromkeys(files, 0)
        for file, _, rows in self.groups:
            sizes[file] += rows
        # The row of the whole table that each file begins with.
        self.first = dict(zip(files, [0, *accumulate(sizes.values())], strict=False))
        self._group, self._next = -1, 0  # the row group that is being decoded, and the row of it that comes next
        self._rows: Iterator[dict[str, object]] = iter(())

    def _footer(self, file: str) -> list[int]:
        """The number of rows in each row group of a file."""
        try:
            with self._file(file) as opened:
                names = opened.schema_arrow.names
                metadata = opened.metadata
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is no whole Parquet file ({error}): replace it or correct {self.key}") from error
        for key, column in (("image_column", self.columns.image), ("caption_column", self.columns.caption)):
            if column and column not in names:
                raise ValueError(f"{file} has no column {column!r} but {', '.join(names)}: set data.init_args.{key}")
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def __len__(self) -> int:
        """The number of rows in all files."""
        return self.starts[-1]

    def name(self, position: int) -> str:
        """The name of the file and the number of the row in it."""
        file = self.groups[bisect_right(self.starts, position) - 1][0]
        return f"{shown(file)}/{position - self.first[file]}"

    def item(self, position: int) -> Item:
        """The image and the caption of a row. Going forward in a row group is cheap, going back starts it again."""
        group = bisect_right(self.starts, position) - 1
        place = position - self.starts[group]
        if group != self._group or place < self._next:
            self._group, self._next, self._rows = group, 0, self._open(group)
        try:
            row = next(islice(self._rows, place - self._next, None))
        except (OSError, ValueError, StopIteration) as error:
            self._group = -1
            raise ValueError(f"the row group is corrupted: {error}") from error
        self._next = place + 1
        return Item(self.name(position), content_of(row[self.columns.image], self.folder), self.columns.caption_of(row))

    def _open(self, group: int) -> Iterator[dict[str, object]]:
        file, number, _ = self.groups[group]
        with self._file(file) as opened:
            for batch in opened.iter_batches(ROWS, row_groups=[number], columns=self.columns.names):
                yield from batch.to_pylist()

    def without_caption(self) -> Iterator[int]:
        """The numbers of the rows whose caption is missing or empty. A damaged row group is left to `item`."""
        for start, (file, number, _) in zip(self.starts, self.groups, strict=False):
            with contextlib.suppress(OSError, ValueError), self._file(file) as opened:
                batches = opened.iter_batches(1000, row_groups=[number], columns=[self.columns.caption])
                rows = (row for batch in batches for row in batch.to_pylist())
                yield from (start + place for place, row in enumerate(rows) if self.columns.caption_of(row) is None)

    @contextlib.contextmanager
    def _file(self, file: str) -> Iterator[Any]:
        parquet, path = required("pyarrow.parquet"), self.folder / file
        with contextlib.ExitStack() as stack:
            mapped = shown(str(path)) == str(path)  # pyarrow takes no name that is not UTF-8
            source = path if mapped else stack.enter_context(path.open("rb"))
            yield stack.enter_context(parquet.ParquetFile(source, memory_map=mapped))


def list_tables(root: str, key: str) -> tuple[Path, Listing] | None:
    """The folder of Parquet files, and those in it by their names; None if ``root`` is something else.

    Args:
        root: A Parquet file, a pattern with ``*`` in its last part, or a folder, whose subfolders are searched, too.
        key: The setting of the configuration that is ``root``, for errors.

    Raises:
        FileNotFoundError: There is no such file, or the pattern or folder holds none.
    """
    place = Path(root).expanduser()
    if place.is_dir() and not (place / "state.json").is_file() and not (place / "dataset_dict.json").is_file():
        folder, files = place, list_files(place, key, {SUFFIX})
    elif place.suffix.lower() == SUFFIX and "://" not in root:
        folder, files = place.parent, matching(place)
    else:
        return None
    if not files.names:
        raise FileNotFoundError(f"{key}={root!r} holds no Parquet file: point {key} at *.parquet or a folder of them")
    return folder, files


def required(module: str) -> ModuleType:
    """Import a module of the optional dependencies ``data``.

    Raises:
        ImportError: It is not installed; the message is the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"TableData needs {module}: pip install 'uae[data]'") from error
