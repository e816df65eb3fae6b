"""Where every random number of a rollout comes from: the run's seed, the image's id, the step, and the row's place."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any


def caption_seeds(plan: Any, ids: Sequence[int], step: int) -> list[int]:
    """One seed per caption (N): captions of one image differ. ``plan`` is a `uae.rollout.Plan`."""
    return [seed_of(plan.seed, image, step, "caption", g) for image in ids for g in range(plan.group)]


def noise_seeds(plan: Any, ids: Sequence[int], step: int) -> list[int]:
    """One seed per reconstruction (N*M) for the renderer; the m-th ones of a group are equal where the noise is shared.

    They never are where reconstructions of different captions are compared to train the renderer: a baseline that
    depends on an action's own noise would bias its gradient.
    """
    compared = plan.train != "captions" and plan.reconstructions == 1
    seeds = []
    for image in ids:
        for g in range(plan.group):
            place = () if plan.shared_noise and not compared else ("noise", g)
            seeds += [seed_of(plan.seed, image, step, *place, *_number(m)) for m in range(plan.reconstructions)]
    return seeds


def _number(m: int) -> tuple[str | int, ...]:
    return ("reconstruction", m) if m else ()


def seed_of(*key: int | str) -> int:
    """A 63-bit seed that depends on its key only: not on the rank, the batch or Python's salted hash."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
