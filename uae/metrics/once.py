"""Which images of a batch are new: loaders may repeat images so that all processes take as many batches."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from uae.types import ImageBatch


class Once:
    """The ids of all images that any process has had since the last reset."""

    def __init__(self) -> None:
        self._seen = set[int]()

    def new(self, ids: Tensor) -> list[int]:
        """The rows of a batch whose images no process has had before; of several processes the first one has them.

        All processes have to call this equally often.

        Args:
            ids: The ids of the images of this process, int64 ``[B]``.
        """
        parts, rank = [ids.tolist()], 0
        if torch.distributed.is_initialized():
            rank = torch.distributed.get_rank()
            parts = [[] for _ in range(torch.distributed.get_world_size())]
            torch.distributed.all_gather_object(parts, ids.tolist())
        mine: list[int] = []
        for process, part in enumerate(parts):
            for row, image in enumerate(part):
                if image not in self._seen and process == rank:
                    mine.append(row)
                self._seen.add(image)
        return mine

    def reset(self) -> None:
        """Forget all ids."""
        self._seen.clear()


def part_of(batch: ImageBatch, rows: list[int]) -> ImageBatch:
    """Some images of a batch, with all that the batch says about them."""
    columns = cast("dict[str, Tensor | list[object]]", batch)
    part = {key: column[rows] if isinstance(column, Tensor) else [column[row] for row in rows] for key, column in columns.items()}
    return cast("ImageBatch", part)
