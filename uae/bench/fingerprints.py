"""Digests of files: a result names its inputs by content, since a file can change and keep its name."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 1 << 22


def sha256(path: str | Path) -> str:
    """The sha256 of a file's bytes, or of all files below a folder with their relative names, as hexadecimal digits."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def git_blob(path: str | Path) -> str:
    """The digest that ``git hash-object`` prints for a file; published prompt files are recognised by it."""
    content = Path(path).read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
