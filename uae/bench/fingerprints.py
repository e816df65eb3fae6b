"""What was read, by its content: names stay the same when files change."""

from __future__ import annotations

import hashlib
from pathlib import Path

_BLOCK = 1 << 22


def sha256(path: str | Path) -> str:
    """Of a file's bytes; of a folder's files, with their relative names."""
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
    """What ``git hash-object`` prints: published files are named by it."""
    content = Path(path).read_bytes()
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
