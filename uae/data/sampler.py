"""Which images a rank sees when: all ranks take as many batches, and a resumed run continues with the next one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sized
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from uae.types import ImageBatch

LOUD = 5  # unreadable images that are warned about


class ImageSource(Sized, Protocol):
    """Images by position, a whole batch at once."""

    def __getitems__(self, positions: list[int]) -> tuple[ImageBatch, dict[str, str]]:
        """The batch, and which files were left out and why."""
        ...


class TrainBatches:
    """Positions of training batches: a seeded permutation per epoch, dealt out to the ranks, the tail dropped.

    Batch k of all ranks together is the same set of images whatever the number of ranks, as long as
    ``batch_size * world_size`` is.

    Args:
        count: Number of images.
        batch_size: Images per batch and rank.
        rank: Of this process.
        world_size: Number of processes.
        seed: Seed of the order.
        shuffle: False keeps the data's own order.

    Raises:
        ValueError: There are fewer images than one batch of every rank takes.
    """

    def __init__(
        self, count: int, batch_size: int, rank: int, world_size: int, seed: int = 0, shuffle: bool = True
    ) -> None:
        self.count, self.batch_size, self.rank, self.world_size = count, batch_size, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch = self.start = 0
        self.images = batch_size * world_size  # of all ranks together, per batch
        if not len(self):
            raise ValueError(
                f"{count} training images do not fill one batch of data.batch_size={batch_size} on each of "
                f"{world_size} processes: lower data.batch_size or add images"
            )

    def set_epoch(self, epoch: int) -> None:
        """Lightning calls this before every epoch; each epoch has its own order."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch, the same on every rank."""
        return self.count // self.images

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from ``start`` on."""
        order = torch.arange(self.count)
        if self.shuffle:
            stream = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
            order = torch.randperm(self.count, generator=stream)
        for batch in range(self.start, len(self)):
            first = batch * self.images + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class EvalBatches:
    """Positions of evaluation batches, in order: as many batches on every rank, none larger than ``batch_size``.

    Sizes differ by at most one image, so nothing is padded, with one exception: with fewer images than ranks the last
    ranks repeat the first images (metrics count an id once). A rank without a batch would leave the others waiting.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int) -> None:
        self.count, self.rank, self.world_size = count, rank, world_size
        self.epoch = self.start = 0
        self.images = batch_size * world_size

    def __len__(self) -> int:
        """Batches, the same on every rank."""
        return -(-self.count // self.images)

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches."""
        parts = len(self) * self.world_size
        positions = [i % self.count for i in range(max(self.count, parts))]
        for part in range(self.start * self.world_size + self.rank, parts, self.world_size):
            yield positions[part * len(positions) // parts : (part + 1) * len(positions) // parts]


class ImageLoader:
    """Batches of images; each training batch comes ``repeats`` times in a row, read from the disk once.

    It is not a `DataLoader` but holds one, because Lightning replaces the sampler of anything that is. Lightning
    stores `state_dict` in checkpoints (the first rank's: all ranks are equally far) and calls `load_state_dict`.

    Args:
        source: The images.
        batches: A `TrainBatches` or an `EvalBatches`.
        repeats: How often each batch comes, see ``batches_per_rollout`` of the training module.
        num_workers: Processes that read ahead.
        skipped: Filled with the names of unreadable files and the reasons.
    """

    batch_sampler = None  # Lightning looks for it beside ``sampler``, where it sets the epoch

    def __init__(
        self,
        source: ImageSource,
        batches: TrainBatches | EvalBatches,
        repeats: int = 1,
        num_workers: int = 0,
        skipped: dict[str, str] | None = None,
    ) -> None:
        self.sampler, self.repeats = batches, repeats
        self.skipped = {} if skipped is None else skipped
        self.loader: DataLoader[Any] = DataLoader(
            source,  # type: ignore[arg-type]
            batch_sampler=batches,  # type: ignore[arg-type]
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the default draws from the global stream, which a resumed run then lacks
        )
        self.position = 0  # batches handed out in this epoch
        self._resumed: dict[str, int] | None = None

    def __len__(self) -> int:
        """Batches per epoch, also when an epoch is entered in the middle."""
        return len(self.sampler) * self.repeats

    def __iter__(self) -> Iterator[ImageBatch]:
        """One epoch, or what a resumed run has left of it."""
        self.position = self._take_resumed()
        skip = self.position % self.repeats
        self.sampler.start = self.position // self.repeats
        for batch, failures in self.loader:
            self._warn(failures)
            for _ in range(skip, self.repeats):
                self.position += 1
                yield batch
            skip = 0

    def _take_resumed(self) -> int:
        """Where to begin: 0, unless a checkpoint was loaded that was written in the middle of this epoch."""
        state, self._resumed = self._resumed, None
        if state is None or state["epoch"] != self.sampler.epoch:
            return 0
        position = state["position"]
        if (self.sampler.images, self.repeats) != (state["images"], state["repeats"]):  # other batches: round down
            position = position // state["repeats"] * state["images"] // self.sampler.images * self.repeats
        return position if position < len(self) else 0

    def _warn(self, failures: dict[str, str]) -> None:
        for name, reason in failures.items():
            if name not in self.skipped:
                self.skipped[name] = reason
                if len(self.skipped) > LOUD:
                    continue  # all are named in a file, see `uae.data.skipped`
                warnings.warn(f"unreadable image {name} ({reason}), {len(self.skipped)} skipped so far", stacklevel=2)

    def state_dict(self) -> dict[str, int]:
        """How many batches of which epoch were handed out."""
        here = {"images": self.sampler.images, "repeats": self.repeats}
        return self._resumed or {"epoch": self.sampler.epoch, "position": self.position, **here}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after that many batches, if the next epoch asked for is still that one."""
        self._resumed = dict(state)


def _as_it_is(batch: Any) -> Any:
    return batch
