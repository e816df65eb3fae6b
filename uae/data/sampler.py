"""Which process sees which images when: all processes take as many batches, and a resumed run continues with the next one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Sized
from typing import Any, Protocol, TypeAlias, cast

import torch
from torch.utils.data import DataLoader, Dataset

from uae.data.skipped import Skipped
from uae.data.tally import Tally
from uae.types import ImageBatch

LOUD = 5  # how many unreadable images are warned about, one by one

Fetched: TypeAlias = tuple[ImageBatch, dict[str, str]] | tuple[ImageBatch, dict[str, str], dict[str, Tally]]
"""A batch, and the names of images that were left out of it because they are unreadable, with the reasons.

A stream adds the names of the shards that were read for it, with what was found in them so far.
"""


class ImageSource(Sized, Protocol):
    """Images by position, a whole batch at once."""

    def __getitems__(self, positions: list[int]) -> Fetched:
        """The images at some positions."""
        ...


class TrainBatches:
    """Positions of training batches: a seeded permutation per epoch, dealt out to the processes.

    Batch k of all processes together is the same set of images whatever the number of processes, as long as
    ``batch_size * world_size`` stays the same. Images at the end of the permutation that fill no batch are dropped.

    Args:
        count: The number of images.
        batch_size: Images per batch and process.
        rank: The number of this process, in [0, world_size).
        world_size: The number of processes.
        seed: Seed of the order.
        shuffle: Whether to permute the images. Otherwise they come in the order of the data set.

    Raises:
        ValueError: There are too few images for one batch on every process.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int, seed: int = 0, shuffle: bool = True) -> None:
        self.count, self.batch_size, self.rank, self.world_size = count, batch_size, rank, world_size
        self.seed, self.shuffle = seed, shuffle
        self.epoch = self.start = 0
        self.images = batch_size * world_size  # in a batch of all processes together
        if not len(self):
            raise ValueError(
                f"{count} training images do not fill one batch of data.init_args.batch_size={batch_size} on each of "
                f"{world_size} processes: lower data.init_args.batch_size or add images"
            )

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, each of which has its own order. Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        """The number of batches in an epoch, which is the same on every process."""
        return self.count // self.images

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this process, from number ``start`` on."""
        order = torch.arange(self.count)
        if self.shuffle:
            stream = torch.Generator().manual_seed(random.Random(f"{self.seed}/{self.epoch}").getrandbits(63))
            order = torch.randperm(self.count, generator=stream)
        for batch in range(self.start, len(self)):
            first = batch * self.images + self.rank * self.batch_size
            yield order[first : first + self.batch_size].tolist()


class EvalBatches:
    """Positions of evaluation batches in order: as many batches on every process, none larger than ``batch_size``.

    The sizes differ by at most one image, so nothing is padded, with one exception. If there are fewer images than
    processes, the last processes repeat the first images, since a process without a batch would leave the others waiting.
    Metrics count an id once.

    Args:
        count: The number of images.
        batch_size: Images per batch and process, at most.
        rank: The number of this process, in [0, world_size).
        world_size: The number of processes.
    """

    def __init__(self, count: int, batch_size: int, rank: int, world_size: int) -> None:
        self.count, self.rank, self.world_size = count, rank, world_size
        self.epoch = self.start = 0
        self.images = batch_size * world_size

    def __len__(self) -> int:
        """The number of batches, which is the same on every process."""
        return -(-self.count // self.images)

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this process, from number ``start`` on."""
        parts = len(self) * self.world_size
        positions = [i % self.count for i in range(max(self.count, parts))]
        for part in range(self.start * self.world_size + self.rank, parts, self.world_size):
            yield positions[part * len(positions) // parts : (part + 1) * len(positions) // parts]


class ImageLoader:
    """Batches of images. Every training batch comes ``repeats`` times in a row, but is read once.

    This is not a `DataLoader` but has one, because Lightning replaces the sampler of anything that is one. Lightning stores
    `state_dict` in checkpoints (that of the first process: all processes are equally far) and calls `load_state_dict`.

    Args:
        source: The images.
        batches: The positions of every batch.
        repeats: How many times in a row every batch comes, see `uae.data.module.RepeatsBatches`.
        num_workers: The number of processes that read ahead; 0 reads in this process.
        skipped: Receives the names of unreadable images and the reasons.
    """

    batch_sampler = None  # Lightning looks for it beside ``sampler``, where it sets the epoch

    def __init__(
        self,
        source: ImageSource,
        batches: TrainBatches | EvalBatches,
        repeats: int = 1,
        num_workers: int = 0,
        skipped: Skipped | None = None,
    ) -> None:
        self.sampler, self.repeats = batches, repeats
        self.skipped = Skipped() if skipped is None else skipped
        self.loader: DataLoader[Fetched] = DataLoader(
            cast("Dataset[Fetched]", source),  # of a data set with __getitems__, nothing else is used
            batch_sampler=batches,
            num_workers=num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # the default draws from the global stream, which a resumed run then lacks
        )
        self.position = 0  # batches handed out in this epoch
        self._resumed: dict[str, int] | None = None

    def __len__(self) -> int:
        """The number of batches in an epoch, with repetitions, also if the epoch is entered in the middle."""
        return len(self.sampler) * self.repeats

    def __iter__(self) -> Iterator[ImageBatch]:
        """The batches of an epoch, or what a resumed run has left of it."""
        self.position = self._take_resumed()
        skip = self.position % self.repeats
        self.sampler.start = self.position // self.repeats
        for batch, failures, *tallies in self.loader:
            self._warn(failures)
            for shards in tallies:
                self.skipped.count(shards)
            for _ in range(skip, self.repeats):
                self.position += 1
                yield batch
            skip = 0

    def _take_resumed(self) -> int:
        """The batch to begin with: 0, unless a checkpoint was loaded that was written in the middle of this epoch."""
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
                if len(self.skipped) <= LOUD:  # a file names all of them, see `uae.data.skipped`
                    warnings.warn(f"unreadable image {name} ({reason}), {len(self.skipped)} skipped so far", stacklevel=2)

    def state_dict(self) -> dict[str, int]:
        """The epoch, how many of its batches were handed out, and what that number depends on."""
        here = {"images": self.sampler.images, "repeats": self.repeats}
        return self._resumed or {"epoch": self.sampler.epoch, "position": self.position, **here}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next epoch behind the batches of a `state_dict`, if it is the same epoch."""
        self._resumed = dict(state)


def _as_it_is(fetched: Any) -> Any:  # the annotation of collate_fn expects single images
    return fetched
