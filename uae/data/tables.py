"""Tables with an image column: rows by number, and Parquet files as such a table."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

from uae.data.source import Item, PictureSource
from uae.files.pictures import Reading, UnreadableImageError

ROWS = 16  # taken from a file at a time


def content_of(value: Any, root: Path | None) -> bytes | Path | UnreadableImageError:
    """What an image column holds as bytes or a file: bytes, ``{"bytes", "path"}`` or a path.

    Args:
        value: Of one row.
        root: Folder that paths are relative to and do not leave; None allows no path.
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


def caption_of(value: Any) -> str | None:
    """A caption column's value, stripped; of several the first; None if there is none."""
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return value.strip() or None if isinstance(value, str) else None


class TableSource(PictureSource):
    """Rows of a table, by position.

    Args:
        table: Reads rows.
        rows: Numbers of those that belong here.
        reading: See `PictureSource`, like ``role`` and ``replace``.
    """

    def __init__(
        self, table: Table, rows: Sequence[int], reading: Reading, role: str = "", replace: bool = False
    ) -> None:
        super().__init__(reading, role, replace)
        self.table, self.rows = table, rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def name(self, position: int) -> str:
        """File and number of a row."""
        return self.table.name(self.rows[position])

    def item(self, position: int) -> Item:
        """The image and caption of a row."""
        return self.table.item(self.rows[position])


class Table:
    """Rows with an image and perhaps a caption, by number."""

    def __len__(self) -> int:
        """Number of rows."""
        raise NotImplementedError

    def name(self, row: int) -> str:
        """Of a row, without reading it; the same on every machine."""
        raise NotImplementedError

    def item(self, row: int) -> Item:
        """A row's image, not decoded, and its caption. May raise OSError or ValueError."""
        raise NotImplementedError


class ParquetTable(Table):
    """Parquet files as they are: footers are read first, rows when they are asked for.

    A row is found by decoding its row group up to it, a few rows at a time, so small row groups (about 100 images) make
    random access fast, and none is held in memory as a whole.

    Args:
        folder: Of the files; paths in the image column are relative to it.
        files: Names relative to it.
        image_column: Column of the images.
        caption_column: Column of the captions; None for none.
        key: Of the configuration, for errors: the setting that names the files.

    Raises:
        ValueError: A file is no Parquet file or lacks a column.
    """

    def __init__(
        self, folder: Path, files: list[str], image_column: str, caption_column: str | None, key: str = "data.root"
    ) -> None:
        self.folder, self.files, self.key = folder, files, key
        self.image_column, self.caption_column = image_column, caption_column
        self.columns = [image_column, *([caption_column] if caption_column else [])]
        self.groups = [(file, group, rows) for file in files for group, rows in enumerate(self._footer(file))]
        self.starts = [0, *accumulate(rows for *_, rows in self.groups)]
        sizes = dict.fromkeys(files, 0)
        for file, _, rows in self.groups:
            sizes[file] += rows
        self.first = dict(zip(files, [0, *accumulate(sizes.values())], strict=False))  # row of the table a file begins with
        self._group, self._next, self._rows = -1, 0, iter(())  # what the reader is before

    def _footer(self, file: str) -> list[int]:
        """Rows of each row group."""
        parquet = required("pyarrow.parquet")

        try:
            with parquet.ParquetFile(self.folder / file) as opened:
                names = opened.schema_arrow.names
                metadata = opened.metadata
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} is no whole Parquet file ({error}): replace it or correct {self.key}") from error
        for key, column in (("image_column", self.image_column), ("caption_column", self.caption_column)):
            if column and column not in names:
                raise ValueError(f"{file} has no column {column!r} but {', '.join(names)}: set data.init_args.{key}")
        return [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]

    def __len__(self) -> int:
        """Rows of all files."""
        return self.starts[-1]

    def name(self, row: int) -> str:
        """The file and the number of the row in it."""
        file = self.groups[bisect_right(self.starts, row) - 1][0]
        return f"{file}/{row - self.first[file]}"

    def item(self, row: int) -> Item:
        """Reads on to a row, or its row group from the beginning."""
        group = bisect_right(self.starts, row) - 1
        place = row - self.starts[group]
        if group != self._group or place < self._next:
            self._group, self._next, self._rows = group, 0, self._open(group)
        try:
            for _ in range(self._next, place + 1):
                values = next(self._rows)
                self._next += 1
        except (OSError, ValueError, StopIteration) as error:
            self._group = -1
            raise ValueError(f"the row group is corrupted: {error}") from error
        caption = caption_of(values[self.caption_column]) if self.caption_column else None
        return Item(self.name(row), content_of(values[self.image_column], self.folder), caption)

    def _open(self, group: int) -> Iterator[dict[str, Any]]:
        parquet = required("pyarrow.parquet")

        file, number, _ = self.groups[group]
        with parquet.ParquetFile(self.folder / file, memory_map=True) as opened:
            for batch in opened.iter_batches(ROWS, row_groups=[number], columns=self.columns):
                yield from batch.to_pylist()


def list_tables(root: str, key: str) -> tuple[Path, list[str]] | None:
    """Folder and relative names of Parquet files: one file, a pattern with ``*``, or all below a folder; None if it is neither.

    Raises:
        FileNotFoundError: The pattern or folder matches nothing.
    """
    place = Path(root).expanduser()
    if place.is_dir() and not (place / "state.json").is_file() and not (place / "dataset_dict.json").is_file():
        folder, files = place, sorted(file.relative_to(place).as_posix() for file in place.rglob("*.parquet"))
    elif place.suffix == ".parquet" and "://" not in root:
        folder = place.parent
        files = sorted(file.name for file in folder.glob(place.name)) if "*" in place.name else [place.name]
        files = [file for file in files if (folder / file).is_file()]
    else:
        return None
    if not files:
        raise FileNotFoundError(f"{key}={root!r} holds no Parquet file: point {key} at *.parquet or a folder of them")
    return folder, files


def required(module: str) -> Any:
    """A module of the extra ``data``.

    Raises:
        ImportError: It is not installed; with the command.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ImportError(f"TableData needs {module}: pip install 'uae[data]'") from error
