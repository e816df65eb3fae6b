"""What an image tower saw, kept for the passes of one rollout: where the tower is frozen, it runs once and not at every pass.

Transformers puts the features of images in the place of their tokens, see ``get_image_features`` of its models. They are taken
from there and handed in there, so that a model's own code decides what is done with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

HANDED_ON = {"pooler_output", "deepstack_features"}  # of a tower's output: what is put in the place of image tokens ...
ASIDE = {"last_hidden_state", "hidden_states", "attentions"}  # ... and what is not used once they are made


@dataclass(frozen=True)
class ImageFeatures:
    """The features of B images, detached.

    Args:
        create: Makes the tower's output from its layers, by name. A partial of its class and not the class itself, which is a
            dataclass: torch's distributed code would take it for an instance and fail.
        shapes: For each of its layers, the number of dimensions of the one tensor that it is; 0 for a list of tensors.
        rows: For every image, what is put in the place of its tokens, ``[tokens, D]``, then what is added there behind each
            of the first text layers (the deepstack of Qwen3-VL).
    """

    create: Callable[..., Any]
    shapes: tuple[int, ...]
    rows: tuple[tuple[Tensor, ...], ...]

    def index(self, images: Sequence[int]) -> ImageFeatures:
        """The features of some images, in the order given."""
        return replace(self, rows=tuple(self.rows[image] for image in images))

    def output(self) -> Any:
        """What the tower would return for these images."""
        layers = [torch.cat(rows) for rows in zip(*self.rows, strict=True)]
        shaped: list[Any] = [
            [layer] if dimensions == 0 else layer[None] if dimensions == 3 else layer
            for layer, dimensions in zip(layers, self.shapes, strict=True)
        ]
        return self.create(pooler_output=shaped[0], **({"deepstack_features": shaped[1:]} if shaped[1:] else {}))


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


def kept(seen: Sequence[Any], ids_BP: Tensor, image_token: int | None) -> ImageFeatures | None:
    """The features out of what `looking` has collected; None if the tower's output is of an unknown kind.

    Args:
        seen: What the tower returned.
        ids_BP: The prompts, one with each of the B images.
        image_token: Id of the token that stands for a part of an image.
    """
    if image_token is None or len(seen) != 1 or getattr(seen[0], "pooler_output", None) is None:
        return None
    if {name for name, value in seen[0].items() if value is not None} - HANDED_ON - ASIDE:
        return None  # the model may use what is not kept here
    layers = [seen[0].pooler_output, *(getattr(seen[0], "deepstack_features", None) or ())]
    if not all(isinstance(part, Tensor) for layer in layers for part in _parts(layer)):
        return None
    tokens_B: list[int] = (ids_BP == image_token).sum(1).tolist()
    flat = [torch.cat([part.detach().reshape(-1, part.shape[-1]) for part in _parts(layer)]) for layer in layers]
    if any(len(rows) != sum(tokens_B) for rows in flat):
        return None
    rows = zip(*(layer.split(tokens_B) for layer in flat), strict=True)
    kind: Any = type(seen[0])
    unused = {one.name: None for one in fields(kind) if one.name in ASIDE}  # some classes want them said
    shapes = tuple(layer.ndim if isinstance(layer, Tensor) else 0 for layer in layers)
    return ImageFeatures(partial(kind, **unused), shapes, tuple(rows))


def _parts(layer: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [layer] if isinstance(layer, Tensor) else layer
