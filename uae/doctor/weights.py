"""The folders of checkpoints below ``UAE_CHECKPOINTS``: which are there, and whether their files are whole."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from uae.cli.values import leaves
from uae.doctor.finding import Finding, note, ok, wrong
from uae.files.locations import ROOT
from uae.files.packaged import FOLDER, names
from uae.files.settings import read_settings
from uae.rehearsal.catalog import MARK, catalog

WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
UNFINISHED = (".incomplete", ".partial", ".part", ".aria2")
POINTER = b"version https://git-lfs"  # what a clone without Git LFS has in the place of a large file


def check_weights() -> list[Finding]:
    """The findings about ``UAE_CHECKPOINTS``, for every configuration of a real system."""
    given = os.environ.get(ROOT)
    if given is None:
        return [note(f"{ROOT} is not set: checkpoints are looked for as paths, then on the hub (the miniatures need none)")]
    if not given.strip() or not Path(given).expanduser().is_dir():
        return [wrong(f"{ROOT}={given!r} is no folder", f"give {ROOT} the folder that holds OWNER/MODEL folders, or unset it")]
    mirror = Path(given).expanduser()
    found = {name: mirror / name for names_ in needed().values() for name in names_ if (mirror / name).exists()}
    lines = [_of_configuration(config, names_, found) for config, names_ in needed().items()]
    return [*lines, *(finding for name in sorted(found) for finding in check_folder(name, found[name]))]


def needed() -> dict[str, list[str]]:
    """The checkpoints that every complete configuration of a real system names, by the name of the configuration."""
    known, found = catalog(), {}
    for config in (name for name in names() if "/" not in name):
        values = [value for _, value in leaves(read_settings(FOLDER / f"{config}.yaml")) if isinstance(value, str)]
        if named := list(dict.fromkeys(name for value in values for name in known if f"{value}/".startswith(f"{name}/"))):
            found[config] = named
    return found


def _of_configuration(config: str, named: list[str], found: dict[str, Path]) -> Finding:
    missing = [name for name in named if name not in found]
    if not missing:
        return ok(f"configs/{config}.yaml: all of its checkpoints are there")
    return note(f"configs/{config}.yaml: {len(named) - len(missing)} of {len(named)} checkpoints are there; not: {', '.join(missing)}")


def check_folder(name: str, folder: Path) -> list[Finding]:
    """The findings about one checkpoint.

    Args:
        name: Its name below ``UAE_CHECKPOINTS``.
        folder: Where it is.
    """
    faults = list(_faults(folder))
    again = f"download {name} again (hf download {name} --local-dir {folder}), or copy the file from where it is whole"
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        return [wrong(f"{name}: {faults[0]}{more}", again)]
    if (folder / MARK).is_file():
        return [note(f"{name} is a random stand-in of python -m uae.rehearsal, not the released weights")]
    return [ok(f"{name} is whole")]


def _faults(folder: Path) -> Iterator[str]:
    """What is missing or damaged in a checkpoint."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()] if folder.is_dir() else [folder]
    yield from (f"{path.name} is an unfinished download" for path in files if path.suffix in UNFINISHED)
    yield from (fault for path in files if path.name.endswith(".index.json") for fault in _missing_shards(path))
    weights = [path for path in files if path.suffix in WEIGHTS]
    yield from (f"{path.relative_to(folder.parent)} {fault}" for path in weights if (fault := _damage(path)))
    if not weights:
        yield f"there are no weights ({', '.join(WEIGHTS)}) among its {len(files)} files"


def _missing_shards(index: Path) -> Iterator[str]:
    try:
        shards: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError):
        yield f"{index.name} cannot be read"
        return
    missing = (shard for shard in sorted(set(shards.values())) if not (index.parent / shard).is_file())
    yield from (f"{shard} of {index.name} is missing" for shard in missing)


def _damage(path: Path) -> str | None:
    """What is wrong with a file of weights, as far as its size and its ends tell; its numbers are not read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(len(POINTER))
        if start == POINTER:
            return "is a pointer of Git LFS, not the weights"
        if path.suffix == ".safetensors":
            length = int.from_bytes(start[:8], "little")
            if size < 8 or length > size - 8:
                return f"is truncated at {size} bytes"
            file.seek(8)
            whole = 8 + length + _end(file.read(length))
            return None if whole == size else f"has {size} bytes instead of {whole}"
    if start[:2] == b"PK" and not zipfile.is_zipfile(path):
        return f"is truncated at {size} bytes"
    return None if size else "is empty"


def _end(header: bytes) -> int:
    """Where the last tensor of a file of safetensors ends, in bytes behind the header; -1 if the header is damaged."""
    try:
        entries = json.loads(header)
        return max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError):
        return -1
