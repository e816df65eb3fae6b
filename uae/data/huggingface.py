"""Data sets of Hugging Face ``datasets``, on the disk or on the hub: row by row, or streamed from front to back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from uae.data.source import Item
from uae.data.tables import ROWS, Columns, Table, content_of, list_tables, required
from uae.files.pictures import MAX_FILE_BYTES

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

OF_THE_HUB = re.compile(r"(\w+://[^:]*::)?hf://")


@dataclass
class HuggingFaceTable(Table):
    """A memory-mapped data set.

    Args:
        dataset: The data set. Its images must not be decoded.
        split: The name of the split, which the names of the rows begin with.
        columns: The columns to read.
    """

    dataset: Dataset
    split: str
    columns: Columns

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.dataset)

    def name(self, position: int) -> str:
        """The split and the number of a row."""
        return f"{self.split}/{position}"

    def item(self, position: int) -> Item:
        """The image and the caption of a row."""
        return item_of(self.name(position), self.dataset[position], self.columns)

    def without_caption(self) -> Iterator[int]:
        """The numbers of the rows whose caption is missing or empty."""
        column = self.columns.caption
        if column is None:
            return
        start = 0
        for batch in self.dataset.select_columns([column]).iter(1000):
            values = batch[column]
            yield from (start + place for place, value in enumerate(values) if self.columns.caption_of({column: value}) is None)
            start += len(values)


@dataclass
class HuggingFaceShards:
    """A streamed data set as `uae.data.streaming.Shards`: its files are the shards.

    Args:
        dataset: The data set. Its images must not be decoded.
        split: The name of the split, which the names of the shards begin with.
        columns: The columns to read.
    """

    dataset: IterableDataset
    split: str
    columns: Columns

    def __len__(self) -> int:
        """The number of files."""
        return self.dataset.num_shards

    def name(self, shard: int) -> str:
        """The split and the number of a file."""
        return f"{self.split}-{shard:05}"

    def items(self, shard: int) -> Iterator[Item]:
        """The images of a file in order, with their captions."""
        rows = self.dataset.shard(num_shards=len(self), index=shard)
        number = 0
        for batch in rows.iter(ROWS):  # iterating over single rows would share them out among workers once more
            for values in zip(*batch.values(), strict=True):
                yield item_of(f"{self.name(shard)}/{number}", dict(zip(batch, values, strict=True)), self.columns)
                number += 1


def item_of(name: str, row: Mapping[str, object], columns: Columns) -> Item:
    """The image and the caption of a row.

    A row may name a file instead of holding an image. Such a file is read only from the cache of ``datasets`` or from the
    hub, so that a data set cannot show other files of this machine.
    """
    import datasets
    import fsspec

    value = row[columns.image]
    path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else None
    if isinstance(path, str) and OF_THE_HUB.match(path):
        with fsspec.open(path, "rb") as file:
            return Item(name, file.read(MAX_FILE_BYTES + 1), columns.caption_of(row))
    return Item(name, content_of(value, Path(datasets.config.HF_CACHE_HOME)), columns.caption_of(row))


def open_dataset(root: str, subset: str | None, streaming: bool, columns: Columns, key: str) -> HuggingFaceTable | HuggingFaceShards:
    """Open one split of a data set without decoding its images.

    Args:
        root: ``<name or folder>:<split>``, e.g. "org/name:train"; without a split it is "train". A folder or pattern of
            Parquet files works, too.
        subset: The name of the subset (``datasets`` calls it a configuration), for data sets that have several.
        streaming: Whether to return shards, which are read from front to back and not downloaded first, instead of a table.
        columns: The columns to read.
        key: The setting of the configuration that is ``root``, for errors.

    Raises:
        ImportError: ``datasets`` is not installed.
        ValueError: The data set lacks a column.
    """
    datasets = required("datasets")
    name, colon, split = root.rpartition(":") if "://" not in root else (root, "", "")
    name, split = (name, split) if colon else (root, "train")
    place = Path(name).expanduser()
    files = list_tables(name, key) if place.is_dir() else None
    if files:
        paths = [str(files[0] / file) for file in files[1].names]
        found = datasets.load_dataset("parquet", data_files={split: paths}, split=split, streaming=streaming)
    elif place.is_dir():
        found = datasets.load_from_disk(str(place))
        found = found[split] if isinstance(found, dict) else found
        found = found.to_iterable_dataset(num_shards=max(1, len(found) // 1000)) if streaming else found
    elif name.lower().endswith(".parquet"):
        found = datasets.load_dataset("parquet", data_files={split: name}, split=split, streaming=streaming)
    else:
        found = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    for column in columns.names if found.column_names else []:
        if column not in found.column_names:
            given = "data.init_args.image_column and data.init_args.caption_column"
            raise ValueError(f"{key}={root!r} has no column {column!r} but {', '.join(found.column_names)}: correct {given}")
    found = found.select_columns(columns.names)
    features = found.features or {}
    if isinstance(features.get(columns.image), datasets.Image):
        found = found.cast_column(columns.image, datasets.Image(decode=False))
    kind = HuggingFaceShards if streaming else HuggingFaceTable
    return kind(found, re.sub(r"\W+", "-", split), columns)
