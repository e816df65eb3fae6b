"""Loads diffusers pipelines, and changes their components for one call."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from uae.files.locations import locate
from uae.weights.placement import Placement, dtype_argument, torch_dtype
from uae.weights.remote_code import refused


def load_pipeline(name: str, placement: Placement, key: str = "model.init_args.system.init_args.pipeline", **parts: Any) -> Any:
    """A text-to-image pipeline of the class that its checkpoint names, on the CPU, with the checkpoint's scheduler.

    Args:
        name: Folder or hub id in the layout of diffusers.
        placement: Placement whose dtype the networks are loaded in.
        key: Path of the setting that holds ``name``, for error messages.
        parts: Components that replace those of the checkpoint, by name. None leaves a component out.

    Raises:
        ValueError: The pipeline has no component of a name in ``parts``.
        FileNotFoundError: The checkpoint is no pipeline, or lacks a component.
    """
    import diffusers

    path = locate(name)
    local = os.path.isdir(path)
    if local:
        _check_folder(Path(path), key, parts)
    with refused(name):
        return diffusers.DiffusionPipeline.from_pretrained(
            path, **dtype_argument(torch_dtype(placement)), local_files_only=local, trust_remote_code=False, **parts
        )


def _check_folder(folder: Path, key: str, parts: dict[str, Any]) -> None:
    """Raise in one line where diffusers would fail with a long traceback."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no model_index.json, so it is no diffusers pipeline; change {key}")
    index = {name: value for name, value in json.loads(file.read_text()).items() if isinstance(value, list) and name[0] != "_"}
    unknown = sorted(set(parts) - set(index))
    if unknown:
        raise ValueError(f"{folder} has no component {', '.join(unknown)}; allowed: {', '.join(sorted(index))}; change {key}")
    for name, (library, _) in index.items():
        if library is not None and name not in parts and not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} lacks the subfolder {name}; complete the folder or change {key}")


@contextmanager
def without(pipe: Any, names: Iterable[str]) -> Iterator[None]:
    """Inside, the named components are None. The pipeline does not run them or take its device or dtype from them."""
    parts = {name: getattr(pipe, name) for name in names}
    try:
        for name in parts:
            setattr(pipe, name, None)
        yield
    finally:
        for name, part in parts.items():
            setattr(pipe, name, part)


@contextmanager
def fresh_scheduler(pipe: Any) -> Iterator[None]:
    """Inside, the pipeline has a copy of its scheduler. Multistep solvers store earlier predictions and their graphs in it."""
    scheduler = getattr(pipe, "scheduler", None)
    try:
        if scheduler is not None:
            pipe.scheduler = copy.deepcopy(scheduler)
        yield
    finally:
        if scheduler is not None:
            pipe.scheduler = scheduler
