"""Where every random number of a run comes from: a key of the run's seed, an image's id, a step and a purpose."""

from __future__ import annotations

import hashlib


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on its key only: not on the rank, the batch or Python's salted hash."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
