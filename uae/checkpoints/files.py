"""Writes and reads checkpoints, which hold plain data only. A checkpoint that cannot be read gives an error of one line.

A checkpoint is a file, or the folder of shards of a sharded run. Either is written under a temporary name (``.partial``) and
renamed when all of it is on the disk, so a process that is killed at any moment leaves the previous checkpoint unchanged.
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

PARTIAL = ".partial"  # ending of a checkpoint that is being written
REPLACED = ".replaced"  # ending of a complete checkpoint while a newer one takes its name
METADATA = "meta.pt"  # Lightning's file in a folder of shards for everything but weights and optimizer states
VERSION = "pytorch-lightning_version"  # a key in every checkpoint of Lightning


# ------------------------------------------------------------------------------------------------------------ writing


def partial_of(path: Path) -> Path:
    """The temporary name of a checkpoint until it is complete."""
    return path.with_name(path.name + PARTIAL)


def write(content: dict[str, Any], path: Path) -> None:
    """Save a checkpoint file, synchronise it to the disk, and check that it can be read again.

    Raises:
        OSError: The file could not be written. It is removed.
        TypeError: The content has objects other than tensors and plain Python, so it could not be read again.
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
    """The operating system's message, if the chain of exceptions has one."""
    link: BaseException | None = error
    while link is not None and not isinstance(link, OSError):
        link = link.__cause__ or link.__context__
    return str((link and link.strerror) or error).partition("\n")[0]


def publish(partial: Path, path: Path) -> None:
    """Rename a complete checkpoint to its final name. An older checkpoint of that name is removed afterwards.

    Raises:
        OSError: Renaming failed. The older checkpoint keeps its name, and the new one is removed.
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
    """Remove a file, a link or a folder if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove the temporary files of killed processes. Call it only while no process writes, at the start of a run."""
    for aside in folder.glob(f"*{REPLACED}"):
        path = aside.with_name(aside.name.removesuffix(REPLACED))
        if os.path.lexists(path):
            remove(aside)
        else:  # the process was killed between the two renames
            os.rename(aside, path)
    for partial in folder.glob(f"*{PARTIAL}"):
        remove(partial)


def _sync(path: Path) -> None:
    """Synchronise a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # Windows cannot open folders, and does not need this
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
        mmap: Whether tensors stay in the file until they are used.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is empty, truncated, no checkpoint of a run, or holds more than tensors and plain Python.
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
    """The content of a folder of shards without its weights and optimizer states.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: A file is missing, truncated, or holds more than tensors and plain Python.
    """
    _check_presence(path)
    for name in (INDEX, METADATA):
        if not (path / name).is_file():
            raise ValueError(f"checkpoint {str(path)!r} is incomplete or no checkpoint: {name} is missing")
    with _explained(path):
        ShardReader(path).read_metadata()
    with _explained(path / METADATA):
        content = torch.load(path / METADATA, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or VERSION not in content:
        raise ValueError(f"{str(path)!r} is not the checkpoint of a run: {METADATA} lacks {VERSION}")
    return content


def newest(folder: Path) -> Path | None:
    """The furthest checkpoint in a folder that can be loaded; None if there are no checkpoints.

    The furthest has the largest step, whatever the time of the file is: copying changes it. Of equal steps the later file.

    Raises:
        ValueError: There are checkpoints, but none of them can be loaded.
    """
    known = {path.resolve() for path in folder.glob("*.ckpt") if path.exists()}
    known |= {path for path in folder.glob(f"*.ckpt{REPLACED}") if not Path(str(path).removesuffix(REPLACED)).exists()}
    steps, faults = {}, {}
    for path in known:
        try:
            steps[path] = step_of(path)
        except ValueError as error:
            faults[path] = str(error)
    latest_fault = max(faults, key=_age, default=None)
    if steps:
        for path in sorted(faults):
            warnings.warn(f"skipped on the way to the last checkpoint: {faults[path]}", stacklevel=2)
        return max(steps, key=lambda path: (steps[path], *_age(path)))
    if latest_fault is not None:
        raise ValueError(
            f"none of {len(faults)} checkpoints in {str(folder)!r} can be loaded; the newest: {faults[latest_fault]}; give "
            "another ckpt_path, or another run_name to start anew"
        )
    return None


def step_of(path: Path) -> int:
    """The optimizer step of a checkpoint, a file or a folder of shards.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The checkpoint cannot be loaded.
    """
    content = read_metadata(path) if path.is_dir() else read(path, mmap=True)
    return int(content["global_step"])


def _age(path: Path) -> tuple[int, str]:
    """Sorts checkpoints by the time of writing."""
    return path.stat().st_mtime_ns, path.name


def _check_presence(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(f"checkpoint {str(path)!r} is a link to {os.readlink(path)!r}, which is gone: use --ckpt_path last")
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
    except Exception as error:  # damaged bytes can raise almost anything in a reader
        cause = " ".join(str(error).split("\n", 1)[0].split()) or type(error).__name__
        raise ValueError(f"checkpoint {str(path)!r} is truncated or damaged: {cause}; use another one") from error


def _object(error: pickle.UnpicklingError) -> str | None:
    """The object that PyTorch refused to unpickle."""
    found = re.search(r"GLOBAL (\S+)|(?:class|Trying to call reduce for unrecognized function) (\S+)", str(error))
    return next(filter(None, found.groups())) if found else None


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's plugin for checkpoint files, with this module's functions.

    The command line uses it. In Python: ``Trainer(plugins=[CheckpointFiles()])``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write a checkpoint under a temporary name, then rename it.

        Raises:
            OSError: The checkpoint could not be written. An older one of that name is unchanged.
        """
        path = Path(path)
        write(checkpoint, partial_of(path))
        publish(partial_of(path), path)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The content of the file that the first process names, see `read`. All processes must call it."""
        paths = [str(path)]
        if distributed.is_available() and distributed.is_initialized():
            distributed.broadcast_object_list(paths)  # "last" may be another file on another machine
        return read(paths[0])

    def remove_checkpoint(self, path: str | Path) -> None:
        """Remove a file or a folder of shards."""
        remove(Path(path))
