"""Loads diffusers pipelines, and changes their components for one call."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from uae.files.locations import locate
from uae.models.pipelines.quirks import QUIRKS, Quirks
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
        ImportError: The pipeline needs a package that is not installed.
    """
    import diffusers

    path = locate(name)
    local = os.path.isdir(path)
    if local:
        _check_folder(Path(path), key, parts)
    with refused(name):
        config = diffusers.DiffusionPipeline.load_config(path, local_files_only=local)
        named = str(config["_class_name"])  # a checkpoint with code of its own has a list here, which the base class refuses
        quirks = QUIRKS.get(named, Quirks())
        _check_packages(quirks, named)
        parts = {**quirks.left_out, **parts}
        kind = getattr(diffusers, named, diffusers.DiffusionPipeline)  # the base class loads optional parts anyway
        return kind.from_pretrained(
            path, **dtype_argument(torch_dtype(placement)), local_files_only=local, trust_remote_code=False, **parts
        )


def _check_packages(quirks: Quirks, name: str) -> None:
    """Raise in one line where an import of diffusers would fail inside a tokenizer."""
    missing = [package for package in quirks.packages if importlib.util.find_spec(package) is None]
    if missing:
        raise ImportError(f"{name} needs the package {', '.join(missing)}: pip install {' '.join(missing)}")


def _check_folder(folder: Path, key: str, parts: dict[str, Any]) -> None:
    """Raise in one line where diffusers would fail with a long traceback."""
    file = folder / "model_index.json"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} has no model_index.json, so it is no diffusers pipeline; change {key}")
    index = components_of(json.loads(file.read_text()))
    unknown = sorted(set(parts) - set(index))
    if unknown:
        raise ValueError(f"{folder} has no component {', '.join(unknown)}; allowed: {', '.join(sorted(index))}; change {key}")
    for name, (library, _) in index.items():
        if library is not None and name not in parts and not (folder / name).is_dir():
            raise FileNotFoundError(f"{folder} lacks the subfolder {name}; complete the folder or change {key}")


def components_of(index: dict[str, Any]) -> dict[str, tuple[str | None, str | None]]:
    """Library and class by component name, from the content of a ``model_index.json``; both are None if there is no component.

    Other lists are settings: a component is a pair of two strings.
    """
    pairs = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and len(value) == 2 and name[0] != "_"}
    return {name: pair for name, pair in pairs.items() if all(part is None or isinstance(part, str) for part in pair)}


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
def starting_from(pipe: Any, latents: Tensor | None) -> Iterator[None]:
    """Inside, the pipeline's denoising loop starts from these latents, in the loop's own layout; None changes nothing.

    The result of ``prepare_latents`` is replaced. Arguments named ``latents`` are in another layout in some classes (FLUX.2).
    """
    if latents is None:
        yield
        return
    prepare = pipe.prepare_latents

    @functools.wraps(prepare)
    def prepared(*arguments: Any, **named: Any) -> Any:
        made = prepare(*arguments, **named)
        first, *others = made if isinstance(made, tuple) else (made,)
        if first.shape != latents.shape:
            raise RuntimeError(f"latents of {tuple(latents.shape)} instead of {tuple(first.shape)} for {type(pipe).__name__}")
        start = latents.to(first)
        return (start, *others) if others else start

    pipe.prepare_latents = prepared
    try:
        yield
    finally:
        del pipe.prepare_latents


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
