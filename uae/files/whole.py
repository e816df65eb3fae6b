"""Writing small files that are there as a whole or not at all, even if the process is killed while it writes."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a hidden name beside ``path``, then rename it. Missing folders are made.

    Several threads and processes may write the same path at the same time; the last one to finish wins.

    Args:
        path: The file to write.
        content: All bytes of the file.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        draft.write_bytes(content)
    except FileNotFoundError:  # the folder nearly always exists, and checking first would take as long as writing
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
    draft.replace(path)
