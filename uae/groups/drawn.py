"""What was drawn in one rollout, and how some of its images are replaced by what was drawn again."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from uae.types import A, Actions, Condition, Rewards, Rollout, Trajectory, rows_of


@dataclass(frozen=True)
class Drawn:
    """Captions, reconstructions and rewards of B images, before anything is compared.

    Args:
        rollout: N = B*G captions.
        reconstructions_NCHW: N*M reconstructions; those of a caption are in a row.
        trajectory: What the renderer did, if it trains.
        each: Rewards ``[B, G*M]`` of all reconstructions.
    """

    rollout: Rollout[Any]
    reconstructions_NCHW: Tensor
    trajectory: Actions | None
    each: Rewards

    def with_images(self, images: Sequence[int], again: Drawn, encode: Callable[[Rollout[Any]], Condition]) -> Drawn:
        """The same with some images replaced.

        Args:
            images: Numbers of the images that are replaced.
            again: What was drawn of these images, in this order.
            encode: The condition that captions are drawn from, one row for every reconstruction. It is only asked where a renderer
                trains, because a condition cannot be put together from two.
        """
        count = len(self.each.reward_BG)
        per_image = len(self.reconstructions_NCHW) // count
        rows, drawn_rows = rows_of(images, self.rollout.group), rows_of(images, per_image)
        texts = list(self.rollout.texts)
        for row, text in zip(rows, again.rollout.texts, strict=True):
            texts[row] = text
        rollout = replace(_with_rows(self.rollout, rows, again.rollout), texts=texts)
        trajectory = self.trajectory
        if isinstance(trajectory, Trajectory) and isinstance(again.trajectory, Trajectory):
            trajectory = replace(_with_rows(trajectory, drawn_rows, again.trajectory), condition=encode(rollout))
        parts = {name: _placed(part, images, again.each.parts[name]) for name, part in self.each.parts.items()}
        return Drawn(
            rollout,
            _placed(self.reconstructions_NCHW, drawn_rows, again.reconstructions_NCHW),
            trajectory,
            Rewards(_placed(self.each.reward_BG, images, again.each.reward_BG), parts, self.each.weights),
        )


def _with_rows(record: A, rows: list[int], other: A) -> A:
    """The record with all tensors replaced in some rows; what is no tensor stays."""
    tensors = {field.name: getattr(record, field.name) for field in fields(record)}
    changed = {name: _placed(value, rows, getattr(other, name)) for name, value in tensors.items() if isinstance(value, Tensor)}
    return replace(record, **changed)


def _placed(old_R: Tensor, rows: Sequence[int], new: Tensor) -> Tensor:
    """``old_R`` with some rows replaced. Where one has fewer columns, as captions that were shorter do, it gets columns of 0."""
    if old_R.ndim > 1 and old_R.shape[1] != new.shape[1]:
        width = max(old_R.shape[1], new.shape[1])
        old_R, new = (pad(each, (0, width - each.shape[1])) for each in (old_R, new))
    placed_R = old_R.clone()
    placed_R[torch.as_tensor(rows, device=old_R.device)] = new
    return placed_R


def distinct(keys: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    """Places of the first of each kind, and for every key its kind's number in that list."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    number = {key: kind for kind, key in enumerate(first)}
    return list(first.values()), [number[key] for key in keys]
