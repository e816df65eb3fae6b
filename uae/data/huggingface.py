"""Data sets of Hugging Face ``datasets``, on disk or from the hub: by number, or streamed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uae.data.source import Item
from uae.data.tables import ROWS, Table, caption_of, content_of, list_tables, required
from uae.files.pictures import MAX_FILE_BYTES

OF_THE_HUB = re.compile(r"(\w+://[^:]*::)?hf://")


class HuggingFaceTable(Table):
    """A memory-mapped data set of Hugging Face ``datasets``.

    Args:
        dataset: ``datasets.Dataset``, images not decoded.
        split: Goes into the names.
        image_column: Column of the images.
        caption_column: Column of the captions; None for none.
    """

    def __init__(self, dataset: Any, split: str, image_column: str, caption_column: str | None) -> None:
        self.dataset, self.split = dataset, split
        self.image_column, self.caption_column = image_column, caption_column

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.dataset)

    def name(self, row: int) -> str:
        """Split and number."""
        return f"{self.split}/{row}"

    def item(self, row: int) -> Item:
        """A row's image and caption."""
        return item_of(self.name(row), self.dataset[row], self.image_column, self.caption_column)


class HuggingFaceShards:
    """A data set of Hugging Face ``datasets`` that is streamed: its files are the shards.

    Args:
        dataset: ``datasets.IterableDataset``, images not decoded.
        split: Goes into the names.
        image_column: Column of the images.
        caption_column: Column of the captions; None for none.
    """

    def __init__(self, dataset: Any, split: str, image_column: str, caption_column: str | None) -> None:
        self.dataset, self.split = dataset, split
        self.image_column, self.caption_column = image_column, caption_column

    def __len__(self) -> int:
        """Number of files."""
        return self.dataset.num_shards

    def name(self, shard: int) -> str:
        """Split and number."""
        return f"{self.split}-{shard:05}"

    def items(self, shard: int) -> Iterator[Item]:
        """A file's images in order, with their captions."""
        rows = self.dataset.shard(num_shards=len(self), index=shard)
        number = 0
        for batch in rows.iter(ROWS):  # iterating over rows would share them out among workers once more
            for values in zip(*batch.values(), strict=True):
                row = dict(zip(batch, values, strict=True))
                yield item_of(f"{self.name(shard)}/{number}", row, self.image_column, self.caption_column)
                number += 1


def item_of(name: str, values: dict[str, Any], image_column: str, caption_column: str | None) -> Item:
    """A row of ``datasets``. Files it names count only where the library itself has put them or finds them on its hub."""
    import datasets
    import fsspec

    caption = caption_of(values[caption_column]) if caption_column else None
    value = values[image_column]
    path = value.get("path") if isinstance(value, dict) and not value.get("bytes") else None
    if isinstance(path, str) and OF_THE_HUB.match(path):
        with fsspec.open(path, "rb") as file:
            return Item(name, file.read(MAX_FILE_BYTES + 1), caption)
    return Item(name, content_of(value, Path(datasets.config.HF_CACHE_HOME)), caption)


def load(root: str, subset: str | None, streaming: bool, columns: list[str], key: str) -> tuple[Any, str]:
    """A split of a data set on disk or on the hub, images not decoded, and the split's name.

    Args:
        root: ``<name or folder>:<split>``, e.g. "org/name:train"; the split is "train" if none is named.
        subset: Of the data set, where it has several.
        streaming: Do not download it first.
        columns: The image column first.
        key: Of the configuration, for errors.

    Raises:
        ValueError: It lacks a column.
    """
    datasets = required("datasets")
    name, colon, split = root.rpartition(":") if "://" not in root else (root, "", "")
    name, split = (name, split) if colon else (root, "train")
    place = Path(name).expanduser()
    files = list_tables(name, key) if place.is_dir() else None
    if files:
        paths = [str(files[0] / file) for file in files[1]]
        found = datasets.load_dataset("parquet", data_files={split: paths}, split=split, streaming=streaming)
    elif place.is_dir():
        found = datasets.load_from_disk(str(place))
        found = found[split] if isinstance(found, dict) else found
        found = found.to_iterable_dataset(num_shards=max(1, len(found) // 1000)) if streaming else found
    elif name.endswith(".parquet"):
        found = datasets.load_dataset("parquet", data_files={split: name}, split=split, streaming=streaming)
    else:
        found = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    for column in columns if found.column_names else []:
        if column not in found.column_names:
            raise ValueError(f"{key}={root!r} has no column {column!r} but {', '.join(found.column_names)}: see image_column")
    found = found.select_columns(columns)
    features = found.features or {}
    if isinstance(features.get(columns[0]), datasets.Image):
        found = found.cast_column(columns[0], datasets.Image(decode=False))
    return found, re.sub(r"\W+", "-", split)
