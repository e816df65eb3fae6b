"""A cache of embeddings on disk, by image and encoder, so that the sources are embedded once for all systems."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np

from uae.files.whole import write_whole

_DIGEST = hashlib.sha256().digest_size


def default_folder() -> Path:
    """``uae/features`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "uae" / "features"


class FeatureCache:
    """One file per embedding, which starts with its own checksum. Several processes may share the cache.

    Args:
        folder: Folder of the cache; None stores nothing.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder).expanduser()

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
        write_whole(path, hashlib.sha256(numbers).digest() + numbers)

    def _path(self, encoder: str | None, image: str) -> Path | None:
        if self.folder is None or encoder is None:
            return None
        kind = hashlib.sha256(encoder.encode()).hexdigest()[:24]
        return self.folder / kind / image[:2] / image
