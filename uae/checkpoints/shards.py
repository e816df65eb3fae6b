"""Reads a folder of shards without running code in it.

PyTorch reads the index and the non-tensor content of a distributed checkpoint with the pickle module, which runs any code that
a manipulated file names. The classes here read both as plain data.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, Metadata
from torch.distributed.checkpoint.planner import ReadItem

INDEX = ".metadata"  # PyTorch's name of the index file
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_PLAIN = {
    *((_METADATA, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata")),
    *((_METADATA, name) for name in ("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata")),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in _PLAIN:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {module}.{name}")
        return super().find_class(module, name)


class ShardReader(FileSystemReader):
    """PyTorch's reader of shards, but the index is read as plain data and checked."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index of the shards: names, shapes and places of all tensors.

        Raises:
            pickle.UnpicklingError: The index contains classes other than PyTorch's own for an index.
            OSError: A shard is missing or shorter than the index says.
        """
        with open(Path(self.path, INDEX), "rb") as file:
            metadata = _Plain(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"{INDEX} is not an index")
        self._check_sizes(metadata)
        return metadata

    def _check_sizes(self, metadata: Metadata) -> None:
        ends: dict[str, int] = {}
        for part in (metadata.storage_data or {}).values():
            name = part.relative_path
            ends[name] = max(ends.get(name, 0), part.offset + part.length)
        for name, end in ends.items():
            if Path(name).name != name:
                raise OSError(f"{INDEX} names {name!r}, outside the folder")
            file = Path(self.path, name)
            if not file.is_file():
                raise OSError(f"its part {name} is missing")
            if file.stat().st_size < end:
                raise OSError(f"its part {name} has {file.stat().st_size} bytes of {end}")


class PlainPlanner(DefaultLoadPlanner):
    """PyTorch's planner of loading, but shards may hold only tensors and plain Python."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        """Read an entry that is not a tensor with ``weights_only``."""
        plain = torch.load(value, weights_only=True)
        value.seek(0)
        value.truncate()
        torch.save(plain, value)
        value.seek(0)
        super().load_bytes(read_item, value)
