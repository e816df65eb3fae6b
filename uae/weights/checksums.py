"""Checksums of weight files. They reveal an incomplete download or an accidental edit before it changes results."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every weight file below a folder."""
    files = sorted(folder.rglob("*.safetensors"))
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def verify(folder: Path) -> None:
    """Check that the weights in a folder are those in its ``checksums.json``.

    Raises:
        FileNotFoundError: There is no ``checksums.json``.
        ValueError: A file is missing, added or changed.
    """
    listed = folder / "checksums.json"
    if not listed.is_file():
        raise FileNotFoundError(
            f"no cold-started weights in {folder}: run `make pretrain` or correct model.init_args.system.init_args.weights"
        )
    expected, found = json.loads(listed.read_text()), checksums(folder)
    wrong = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    if wrong:
        raise ValueError(f"weights in {folder} differ from checksums.json: {', '.join(wrong)}; run `make pretrain` or restore them")
