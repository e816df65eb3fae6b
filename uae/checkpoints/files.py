"""Checkpoints on disk: complete or absent, plain data, and one line about what is wrong with a bad one.

A checkpoint is a file, or the folder of shards of a sharded run. Either is written under another name (``.partial``) and
renamed when all of it is on the disk, so that a process killed at any moment leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import distributed

from uae.checkpoints.shards import INDEX, ShardReader

PARTIAL = ".partial"  # being written
REPLACED = ".replaced"  # complete, but its name is being given to a newer one
METADATA = "meta.pt"  # Lightning's name for what is neither weights nor optimizer states, in a folder of shards
VERSION = "pytorch-lightning_version"  # in every checkpoint of Lightning


# ------------------------------------------------------------------------------------------------------------ writing


def partial_of(path: Path) -> Path:
    """The name of a checkpoint until it is complete."""
    return path.with_name(path.name + PARTIAL)


def write(content: dict[str, Any], path: Path) -> None:
    """Save a file, down to the disk.

    Raises:
        OSError: It could not be written; nothing is left of it.
        TypeError: It holds something else than tensors and plain Python, and could not be read again.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        torch.load(path, mmap=True, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        remove(path)
        raise TypeError(
            f"a checkpoint would hold {_object(error) or 'objects'}, but may hold only tensors and plain Python: change "
            "state_dict of the callback or on_save_checkpoint of the module that put it there"
        ) from error
    except (OSError, RuntimeError) as error:  # PyTorch's writer turns an OSError into a RuntimeError
        remove(path)
        raise OSError(f"checkpoint {str(path)!r} cannot be written: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The operating system's words, where they are in the chain."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return str((link and link.strerror) or error).partition("\n")[0]


def publish(partial: Path, path: Path) -> None:
    """Give something complete its name. What had the name before is removed afterwards.

    Raises:
        OSError: It did not work; what had the name still has it, and what was complete is removed.
    """
    aside = path.with_name(path.name + REPLACED)
    try:
        _sync(partial)
        folders = [one for one in (partial, path) if one.is_dir() and not one.is_symlink()]
        if folders and os.path.lexists(path):
            remove(aside)
            os.rename(path, aside)  # no system call replaces a folder
        os.replace(partial, path)
    except OSError:
        if os.path.lexists(aside) and not os.path.lexists(path):
            os.rename(aside, path)
        remove(partial)
        raise
    _sync(path.parent)
    remove(aside)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what killed processes left half done. For when nobody writes: at the start of a run."""
    for aside in folder.glob(f"*{REPLACED}"):
        path = aside.with_name(aside.name.removesuffix(REPLACED))
        if os.path.lexists(path):
            remove(aside)
        else:  # killed between the two names
            os.rename(aside, path)
    for partial in folder.glob(f"*{PARTIAL}"):
        remove(partial)


def _sync(path: Path) -> None:
    """Names in a folder, or a file, down to the disk."""
    if os.name == "nt":  # cannot open folders, and needs not
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------------------ reading


def read(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """The content of a checkpoint file.

    Args:
        path: The file.
        mmap: Leave tensors in the file until they are used.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is empty, truncated, of something else, or holds more than tensors and plain Python.
    """
    path = Path(path)
    _check_presence(path)
    if path.is_dir():
        raise ValueError(
            f"checkpoint {str(path)!r} is a folder of shards, which only strategy fsdp2 resumes from: set "
            "trainer.strategy: fsdp2, whatever the number of processes"
        )
    with _explained(path):
        content = torch.load(path, mmap=mmap, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not {"state_dict", VERSION} <= content.keys():
        raise ValueError(f"{str(path)!r} is not the checkpoint of a run: it lacks state_dict or {VERSION}")
    return content


def read_metadata(path: Path) -> dict[str, Any]:
    """What a folder of shards holds besides shards.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: Something is missing, truncated, or not plain.
    """
    _check_presence(path)
    for name in (INDEX, METADATA):
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {str(path)!r} is incomplete or of something else: {name} is missing")
    with _explained(path):
        ShardReader(path).read_metadata()
    with _explained(path / METADATA):
        content = torch.load(path / METADATA, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or VERSION not in content:
        raise ValueError(f"{str(path)!r} is not the checkpoint of a run: {METADATA} lacks {VERSION}")
    return content


def newest(folder: Path) -> Path | None:
    """The newest checkpoint in a folder that can be loaded, or None if there are no checkpoints.

    Raises:
        ValueError: There are checkpoints, but none can be loaded.
    """
    known = {path.resolve() for path in folder.glob("*.ckpt") if path.exists()}
    known |= {path for path in folder.glob(f"*.ckpt{REPLACED}") if not Path(str(path).removesuffix(REPLACED)).exists()}
    faults = []
    for path in sorted(known, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        try:
            read_metadata(path) if path.is_dir() else read(path, mmap=True)
        except ValueError as error:
            faults.append(str(error))
            continue
        for fault in faults:
            warnings.warn(f"skipped on the way to the last checkpoint: {fault}", stacklevel=2)
        return path
    if faults:
        raise ValueError(
            f"none of {len(faults)} checkpoints in {str(folder)!r} can be loaded; the newest: {faults[0]}; give another "
            "ckpt_path, or another run_name to start anew"
        )
    return None


def _check_presence(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"checkpoint {str(path)!r} is a link to {os.readlink(path)!r}, which is gone: use --ckpt_path last"
        )
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}: correct ckpt_path")
    if path.is_file() and not path.stat().st_size:
        raise ValueError(f"checkpoint {str(path)!r} is empty: use an older one")


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except pickle.UnpicklingError as error:
        found = _object(error)
        if found is None:
            raise ValueError(f"{str(path)!r} is damaged or not a checkpoint: PyTorch cannot read it") from error
        raise ValueError(
            f"checkpoint {str(path)!r} holds {found}, which could run code, and is refused: checkpoints hold tensors and "
            "plain Python only"
        ) from error
    except Exception as error:  # whatever damaged bytes make of a reader
        cause = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
        raise ValueError(f"checkpoint {str(path)!r} is truncated or damaged: {cause}") from error


def _object(error: pickle.UnpicklingError) -> str | None:
    """What a refused pickle would have called."""
    found = re.search(r"GLOBAL (\S+)|(?:class|Trying to call reduce for unrecognized function) (\S+)", str(error))
    return next(filter(None, found.groups())) if found else None


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files: complete or absent, read as plain data.

    The command line uses it; elsewhere ``Trainer(plugins=[CheckpointFiles()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write under another name, then rename.

        Raises:
            OSError: It could not be written; what had the name before is still there.
        """
        path = Path(path)
        write(checkpoint, partial_of(path))
        publish(partial_of(path), path)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content of the file that the first process names; see `read`. Collective."""
        paths = [str(path)]
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast_object_list(paths)  # "last" may not be the same on all nodes
        return read(paths[0])

    def remove_checkpoint(self, path: str | Path) -> None:
        """A file, or a folder of shards."""
        remove(Path(path))
