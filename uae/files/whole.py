"""Small files that appear whole or not at all, whoever is killed while writing them."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Fill a hidden file beside ``path``, then give it its name at once; missing folders are made.

    Safe for several threads and processes at a time: the last one wins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    draft.write_bytes(content)
    draft.replace(path)
