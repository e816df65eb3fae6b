"""The files below a folder: which of them are wanted, and why each of the others is not."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

HIDDEN = "hidden"
FOREIGN = "another suffix"
SPECIAL = "no regular file, or a link to nothing"
CIRCLE = "a link to a folder that is searched anyway, or that is above it"
CLOSED = "a folder that cannot be read"


@dataclass
class Listing:
    """What is below a folder, by names relative to it. A name that is not UTF-8 has surrogates in it, as in all of Python.

    Args:
        names: The wanted files, sorted.
        skipped: All other files, and folders that were not searched, with the reasons.
    """

    names: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)


class _Folder(NamedTuple):
    path: str  # relative to the root; empty for the root itself
    hidden: bool


def list_files(
    root: str | Path,
    key: str,
    suffixes: Collection[str],
    belongs: Callable[[str, set[str]], bool] = lambda name, stems: False,
) -> Listing:
    """Search a folder and its subfolders. Links to folders are followed, every folder is searched once.

    Args:
        root: The folder.
        key: The setting of the configuration that names the folder, for errors.
        suffixes: The suffixes of wanted files, in lower case.
        belongs: Whether a file is neither wanted nor skipped, as it belongs to a wanted file in its folder. Gets its name
            and the names of the wanted files without suffixes.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    top = Path(root).expanduser()
    if not str(root).strip() or not top.is_dir():
        raise FileNotFoundError(f"{key}={str(root)!r} is not a folder: point {key} at a folder that exists")
    found = Listing()
    for folder, files in _searched(top, found.skipped):
        for name, reason in _sorted_out(files, folder.hidden, suffixes, belongs):
            if reason is None:
                found.names.append(_joined(folder.path, name))
            else:
                found.skipped[_joined(folder.path, name)] = reason
    found.names.sort()
    return found


def _searched(top: Path, skipped: dict[str, str]) -> Iterator[tuple[_Folder, list[os.DirEntry[str]]]]:
    """Every folder below one with all in it that is no folder to search. Receives in ``skipped`` the folders left out."""
    before = {_identity(folder) for folder in top.resolve().parents}
    folders, links = [_Folder("", hidden=False)], list[_Folder]()
    while folders or links:  # links last, so that a file has the name it has without them
        folder = folders.pop() if folders else links.pop(0)
        try:
            identity = _identity(top / folder.path)
            entries = sorted(os.scandir(top / folder.path), key=lambda entry: entry.name)
        except OSError:
            skipped[folder.path] = CLOSED
            continue
        if identity in before:
            skipped[folder.path] = CIRCLE
            continue
        before.add(identity)
        files = []
        for entry in entries:
            inner = _Folder(_joined(folder.path, entry.name), folder.hidden or is_hidden(entry.name))
            if not _is_folder(entry) or (inner.hidden and entry.is_symlink()):
                files.append(entry)
            else:
                (links if entry.is_symlink() else folders).append(inner)
        yield folder, files


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def matching(path: Path) -> Listing:
    """The files that a path stands for, by their names in its folder: one, or those that match ``*`` in its last part.

    As in a shell, ``*`` matches no hidden file; these are skipped.
    """
    found = Listing()
    if path.exists() or "*" not in path.name:
        found.names = [path.name] if path.is_file() else []
        return found
    pattern = re.compile(".*".join(map(re.escape, path.name.split("*"))), re.DOTALL)
    for file in sorted(path.parent.iterdir()) if path.parent.is_dir() else []:
        if not pattern.fullmatch(file.name):
            continue
        if is_hidden(file.name) and not path.name.startswith("."):
            found.skipped[file.name] = HIDDEN
        elif file.is_file():
            found.names.append(file.name)
        else:
            found.skipped[file.name] = SPECIAL
    return found


def _sorted_out(
    files: list[os.DirEntry[str]], hidden: bool, suffixes: Collection[str], belongs: Callable[[str, set[str]], bool]
) -> Iterator[tuple[str, str | None]]:
    """The files of one folder with the reasons why they are skipped, None for wanted ones."""
    reasons = {entry.name: _reason(entry, hidden, suffixes) for entry in files}
    stems = {PurePosixPath(name).stem for name, reason in reasons.items() if reason is None}
    for name, reason in reasons.items():
        if reason != FOREIGN or not belongs(name, stems):
            yield name, reason


def _reason(entry: os.DirEntry[str], hidden: bool, suffixes: Collection[str]) -> str | None:
    if hidden or is_hidden(entry.name):
        return HIDDEN
    if PurePosixPath(entry.name).suffix.lower() not in suffixes:
        return FOREIGN
    try:
        return None if entry.is_file() else SPECIAL
    except OSError:  # a link to itself
        return SPECIAL


def is_hidden(name: str) -> bool:
    """Whether a part of a path is hidden: ``.cache``, and what macOS adds to archives."""
    return name.startswith(".") or name == "__MACOSX"


def shown(name: str) -> str:
    """A name that can be printed, written and hashed: a byte that is not UTF-8 becomes U+FFFD and its number, as in ``\ufffdE9``."""
    return re.sub("[\ud800-\udfff]", lambda found: f"\ufffd{ord(found[0]) & 0xFF:02X}", name)


def _joined(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
