"""A cache of embeddings on disk, by image and encoder, so that the sources are embedded once for all systems."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

from uae.files.whole import write_whole

_DIGEST = hashlib.sha256().digest_size


def default_folder() -> str:
    """``uae/features`` in the user's cache folder; its ``~`` stays as it is where nobody knows the user's home."""
    return os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "uae", "features")


class FeatureCache:
    """One file per embedding, which starts with its own checksum. Several processes may share the cache.

    A cache only saves time. So where it cannot be written, one line on stderr says so, and nothing more is stored.

    Args:
        folder: Folder of the cache; None stores nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self._lock = threading.Lock()
        self.folder = None if folder is None else Path(os.path.expanduser(folder))
        if self.folder is not None and self.folder.parts[:1] == ("~",):
            self._give_up("this user has no home")

    def read(self, encoder: str | None, image: str) -> np.ndarray | None:
        """The embedding, float32 ``[D]``; None if it is not stored, or its file is damaged.

        Args:
            encoder: Fingerprint of the encoder with its preprocessing; None is never stored.
            image: sha256 of the image file's content.
        """
        path = self._path(encoder, image)
        try:
            content = b"" if path is None else path.read_bytes()
        except OSError:
            return None
        checksum, numbers = content[:_DIGEST], content[_DIGEST:]
        if not numbers or hashlib.sha256(numbers).digest() != checksum:
            return None
        return np.frombuffer(numbers, dtype=np.float32)

    def write(self, encoder: str | None, image: str, feature_D: np.ndarray) -> None:
        """Store an embedding ``[D]``, whole or not at all; for the arguments see `read`."""
        path = self._path(encoder, image)
        if path is None:
            return
        numbers = np.ascontiguousarray(feature_D, dtype=np.float32).tobytes()
        try:
            write_whole(path, hashlib.sha256(numbers).digest() + numbers)
        except OSError as error:
            self._give_up(error.strerror or str(error))

    def _give_up(self, reason: str) -> None:
        with self._lock:
            folder, self.folder = self.folder, None
        if folder is None:  # another thread has said it
            return
        tqdm.write(  # a line of its own, above a bar
            f"warning: embeddings are not kept, since {folder} cannot be written ({reason}); scores stay the same, but the next "
            "run takes as long again: give a folder that can by --cache_folder, or --cache false",
            file=sys.stderr,
        )

    def _path(self, encoder: str | None, image: str) -> Path | None:
        folder = self.folder  # another thread may give up meanwhile
        if folder is None or encoder is None:
            return None
        kind = hashlib.sha256(encoder.encode()).hexdigest()[:24]
        return folder / kind / image[:2] / image
