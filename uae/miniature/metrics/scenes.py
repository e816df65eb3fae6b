"""How well captions and reconstructions of procedural scenes agree with the ground truth. Exact, no model involved."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from uae.miniature.scenes import Scene, detect, parse
from uae.types import ImageBatch

COUNTS = (
    "captions", "valid", "words", "objects", "claims", "recalled", "claims_right", "full", "tiny", "tiny_recalled",
    "tiny_full", "images", "whole", "faithful",
)  # fmt: skip


def agreement(found: Sequence[Scene], truth: Sequence[Scene]) -> dict[str, float]:
    """Detected scenes against complete ones, cell by cell.

    Returns:
        ``placed``: share of true objects whose cell holds an object; ``color``, ``shape``, ``size``: share of those with
        the right attribute; ``background``; ``whole``: share of scenes right in everything, with nothing added.
    """
    count: Counter[str] = Counter()
    for seen, scene in zip(found, truth, strict=True):
        at = {(obj.row, obj.column): obj for obj in seen.objects}
        for obj in scene.objects:
            count["objects"] += 1
            other = at.get((obj.row, obj.column))
            count["placed"] += other is not None
            for attribute in ("color", "shape", "size"):
                count[attribute] += other is not None and getattr(other, attribute) == getattr(obj, attribute)
        count["background"] += seen.background == scene.background
        count["whole"] += seen == scene
    scores = {name: count[name] / max(count["placed"], 1) for name in ("color", "shape", "size")}
    placed = count["placed"] / max(count["objects"], 1)
    return {"placed": placed, **scores, **{name: count[name] / len(truth) for name in ("background", "whole")}}


def says(claim: Any, obj: Any) -> bool:
    """Whether every attribute a caption's object states is the true object's."""
    pairs = ((getattr(claim, name), getattr(obj, name)) for name in ("color", "shape", "size", "row", "column"))
    return all(said is None or said == true for said, true in pairs)


def matches(caption: Scene | None, scene: Scene) -> Counter[str]:
    """Counts of one caption against its scene.

    A claim is right when an object of that color and shape exists that no other claim has taken (``claims_right``,
    ``recalled``); *full* when it states size and position as well and all of it is true.
    """
    count: Counter[str] = Counter(captions=1, objects=len(scene.objects), valid=caption is not None)
    tiny = [obj.size == "tiny" for obj in scene.objects]
    count["tiny"] = sum(tiny)
    claims = list(caption.objects) if caption else []
    count["claims"] = len(claims)
    free = set(range(len(scene.objects)))
    for exact in (True, False):  # exact claims choose first
        for claim in list(claims):
            same = [i for i in sorted(free) if (claim.color, claim.shape) == (scene.objects[i].color, scene.objects[i].shape)]
            full = [i for i in same if claim.size and claim.row and says(claim, scene.objects[i])]
            taken = full if exact else same
            if taken:
                free.discard(taken[0])
                claims.remove(claim)
                count["claims_right"] += 1
                count["recalled"] += 1
                count["full"] += exact
                count["tiny_recalled"] += tiny[taken[0]]
                count["tiny_full"] += exact and tiny[taken[0]]
    return count


class SceneScore(Metric):
    """Caption and reconstruction scores of the procedural scenes.

    Update:
        ``texts``: N captions; ``reconstructions_NCHW``: their images; ``batch``: an ImageBatch with ``scene``.

    Compute:
        ``caption/``: valid, words, recall and precision of objects (color and shape), full (all attributes),
        tiny_recall and tiny_full for the smallest objects. ``reconstruction/``: whole (the image shows exactly the
        source's scene), faithful (strict: the image shows everything its caption says, and as many objects).
    """

    full_state_update = False
    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        for name in COUNTS:
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, texts: list[str], reconstructions_NCHW: Tensor, batch: ImageBatch) -> None:
        """Count one batch of one caption per image."""
        for text, scene, seen in zip(texts, batch["scene"], detect(reconstructions_NCHW), strict=True):
            caption = parse(text)
            count = matches(caption, scene)
            count["words"] = len(text.split())
            count["images"] = 1
            count["whole"] = seen == scene
            count["faithful"] = caption is not None and shows(seen, caption)
            for name in COUNTS:
                getattr(self, name).add_(count[name])

    def compute(self) -> dict[str, Tensor]:
        """Ratios in [0, 1], and words per caption."""
        ratio: dict[str, tuple[Any, Any]] = {
            "caption/valid": (self.valid, self.captions),
            "caption/words": (self.words, self.captions),
            "caption/recall": (self.recalled, self.objects),
            "caption/precision": (self.claims_right, self.claims),
            "caption/full": (self.full, self.objects),
            "caption/tiny_recall": (self.tiny_recalled, self.tiny),
            "caption/tiny_full": (self.tiny_full, self.tiny),
            "reconstruction/whole": (self.whole, self.images),
            "reconstruction/faithful": (self.faithful, self.images),
        }
        return {name: (part / total.clamp(min=1)).float() for name, (part, total) in ratio.items()}


def shows(seen: Scene, caption: Scene) -> bool:
    """Strict: as many objects as the caption names, each claim met by its own object, and the background where it is said."""
    if len(seen.objects) != len(caption.objects) or caption.background not in (None, seen.background):
        return False
    return _assign(list(caption.objects), list(seen.objects))


def _assign(claims: list[Any], objects: list[Any]) -> bool:
    """Whether claims and objects can be paired one to one (at most three of each, so plain search)."""
    if not claims:
        return True
    rest = claims[1:]
    return any(says(claims[0], obj) and _assign(rest, objects[:i] + objects[i + 1 :]) for i, obj in enumerate(objects))
