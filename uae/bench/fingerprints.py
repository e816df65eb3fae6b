"""Digests of files: a result names its inputs by content, since a file can change and keep its name."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from uae.files.locations import here
from uae.files.pictures import SUFFIXES

_BLOCK = 1 << 22
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt)$|(^|_)config\.json$|^model_index\.json$")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_NOT_READ = {".md", *SUFFIXES}  # files of a checkpoint that no system reads


def sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, or of all files below a folder with their relative names, as hexadecimal digits."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        return _of_files(path, [file for file in path.rglob("*") if file.is_file()])
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def git_blob(path: str | Path) -> str:
    """The digest that ``git hash-object`` prints for a file; published prompt files are recognised by it."""
    content = Path(path).read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def weights_digest(module: nn.Module) -> str:
    """The sha256 of the weights of a loaded model, wherever they come from; it takes about a second per gigabyte."""
    digest = hashlib.sha256()
    for name, weight in module.state_dict().items():
        digest.update(f"{name} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def checkpoints(configuration: object, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every checkpoint that a configuration names, and what identifies its content: a name stays when the files behind it change.

    Args:
        configuration: A nested configuration, of which all texts are looked up that are not class paths.
        known: What an earlier call has found, and need not be read again.
    """
    known = known or {}
    found = {name: known.get(name) or checkpoint_digest(name) for name in sorted(set(_texts(configuration)))}
    return {name: digest for name, digest in found.items() if digest is not None}


def checkpoint_digest(name: str) -> str | None:
    """What identifies the content of a checkpoint; None if the name means no checkpoint on this disk.

    For files, this is the sha256 of all their bytes. A digest of samples, or one that is kept while sizes and times stay the same,
    would miss a part that was trained further, or a file of a container image, where all times are equal. The files are about to be
    read in any case, and they are hashed in parallel. Where the hub's cache holds the checkpoint, it is the commit, which is known
    without reading.

    Args:
        name: Name of a checkpoint, as for `uae.files.locations.locate`.
    """
    try:
        place = here(name) if name else None
    except (OSError, ValueError):  # a text that cannot be a path
        return None
    if place is None:
        return _commit(name)
    if place.is_file():
        return sha256(place) if _WEIGHTS.search(place.name) else None
    files = list(_visible(place))
    return _of_files(place, files) if any(_WEIGHTS.search(file.name) for file in files) else None


def _of_files(folder: Path, files: list[Path]) -> str:
    """Digest of files and of their names relative to a folder."""
    names = {file.relative_to(folder).as_posix(): file for file in files}
    ordered = sorted(names)
    with ThreadPoolExecutor(8) as pool:  # hashing releases the interpreter's lock
        digests = pool.map(sha256, [names[name] for name in ordered])
    lines = "".join(f"{name} {digest}\n" for name, digest in zip(ordered, digests, strict=True))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


def _visible(folder: Path) -> Iterator[Path]:
    """The files below a folder that a system may read, also behind links; hidden ones are records of downloads."""
    for root, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for file in (Path(root, name) for name in files if not name.startswith(".")):
            if file.suffix.lower() not in _NOT_READ and file.is_file():
                yield file


def _commit(name: str) -> str | None:
    """The commit of a checkpoint in the hub's cache; None if it is not there."""
    import huggingface_hub

    found = _HUB_ID.match(name)
    if found is None:
        return None
    try:
        return f"commit {Path(huggingface_hub.snapshot_download(found[0], local_files_only=True)).name}"
    except (OSError, ValueError):
        return None


def _texts(node: object, key: str = "") -> Iterator[str]:
    if isinstance(node, str) and key != "class_path":
        yield node
    for name, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list | tuple) else ():
        yield from _texts(inner, str(name))
