"""What an image tower saw, kept for the passes of one rollout: where the tower is frozen, it runs once and not at every pass.

Transformers puts the features of images in the place of their tokens, see ``get_image_features`` of its models. They are taken
from there and handed in there, so that a model's own code decides what is done with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class ImageFeatures:
    """The features of B images, detached.

    Args:
        kind: Class of the tower's output.
        lists: For each of its layers, whether it is a list of tensors ``[tokens, D]``, or else one tensor.
        rows: For every image, what is put in the place of its tokens, ``[tokens, D]``, then what is added there behind each
            of the first text layers (the deepstack of Qwen3-VL).
    """

    kind: type[Any]
    lists: tuple[bool, ...]
    rows: tuple[tuple[Tensor, ...], ...]

    def index(self, images: Sequence[int]) -> ImageFeatures:
        """The features of some images, in the order given."""
        return replace(self, rows=tuple(self.rows[image] for image in images))

    def output(self) -> Any:
        """What the tower would return for these images."""
        layers = [torch.cat(rows) for rows in zip(*self.rows, strict=True)]
        pooled, *deeper = ([layer] if listed else layer[None] for layer, listed in zip(layers, self.lists, strict=True))
        return self.kind(pooler_output=pooled, **({"deepstack_features": deeper} if deeper else {}))


@contextmanager
def looking(model: Any, known: ImageFeatures | None) -> Iterator[list[Any]]:
    """Inside, the model does not run its image tower if features are known; else what the tower returns is put in the list.

    Args:
        model: The model that has ``get_image_features``; one without image tower is left alone.
        known: Features of the images that the model will be given.
    """
    tower, seen = getattr(model, "get_image_features", None), list[Any]()

    def look(*args: Any, **kwargs: Any) -> Any:
        if known is not None:
            return known.output()
        assert tower is not None
        seen.append(tower(*args, **kwargs))
        return seen[-1]

    if tower is None:
        yield seen
        return
    model.get_image_features = look
    try:
        yield seen
    finally:
        del model.get_image_features


def kept(seen: Sequence[Any], tokens_B: Sequence[int]) -> ImageFeatures | None:
    """The features out of what `looking` has collected; None if the tower's output is of an unknown kind.

    Args:
        seen: What the tower returned.
        tokens_B: Number of tokens that stand for each of the B images.
    """
    if len(seen) != 1 or getattr(seen[0], "pooler_output", None) is None:
        return None
    pooled, deeper = seen[0].pooler_output, getattr(seen[0], "deepstack_features", None) or ()
    layers = [pooled, *deeper]
    if not all(isinstance(part, Tensor) for layer in layers for part in layer):
        return None
    flat = [torch.cat([part.detach().reshape(-1, part.shape[-1]) for part in _parts(layer)]) for layer in layers]
    if any(len(rows) != sum(tokens_B) for rows in flat):
        return None
    rows = zip(*(layer.split(list(tokens_B)) for layer in flat), strict=True)
    return ImageFeatures(type(seen[0]), tuple(not isinstance(layer, Tensor) for layer in layers), tuple(rows))


def _parts(layer: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [layer] if isinstance(layer, Tensor) else layer
