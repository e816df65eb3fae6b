"""Data that can only be read from front to back: as many batches on every rank, a seeded order, resumable anywhere.

A data set is a list of shards. Every epoch and every pass over the shards has its own order of them, dealt out to lanes; a
lane reads its shards one after the other through a buffer it draws from. A position of `TrainBatches` says which lane an image
comes from and which of its draws it is, so that ranks and workers need not talk to each other: a resumed run reads its lanes
up to where it was (of the current epoch only) and goes on.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import count
from typing import Protocol

import torch

from uae.data.sampler import TrainBatches
from uae.data.source import Item, Picture, batch_of, decoded
from uae.files.pictures import Reading, UnreadableImageError
from uae.types import ImageBatch


class Shards(Protocol):
    """Parts of a data set, read from front to back."""

    def __len__(self) -> int: ...
    def name(self, shard: int) -> str:
        """Of a shard, the same on every machine."""
        ...

    def items(self, shard: int) -> Iterator[Item]:
        """The images of a shard in order. May raise anything: the rest of the shard is then left out."""
        ...


def passable(shards: Shards, shard: int, failures: dict[str, str]) -> Iterator[Item]:
    """The items of a shard up to where it is broken; what broke goes into ``failures``."""
    try:
        yield from shards.items(shard)
    except Exception as error:  # whatever libraries, file systems and networks raise: training goes on without it
        failures[shards.name(shard)] = f"{type(error).__name__}: {error}"[:300]


class Lane:
    """An endless stream of readable pictures from every ``lanes``-th shard of a shuffled, repeated list.

    Where there are fewer shards than lanes, lanes share a shard: each takes every so-many-th item of it.

    Args:
        shards: The data set.
        reading: How pictures are read.
        number: Of this lane, below ``lanes``.
        lanes: How many share the data set.
        seed: Of the order of the shards (the same for all lanes) and of the draws.
        buffer: Items to draw from; fewer if they hold more than ``reading.max_file_bytes`` together.
        failures: Filled with what could not be read and why.
    """

    def __init__(
        self, shards: Shards, reading: Reading, number: int, lanes: int, seed: str, buffer: int, failures: dict[str, str]
    ) -> None:
        self.shards, self.reading, self.number, self.lanes = shards, reading, number, lanes
        self.seed, self.buffer, self.failures = seed, buffer, failures
        self.drawn = 0  # pictures handed out
        self._pictures = self._decode()

    def __next__(self) -> Picture:
        """The next picture.

        Raises:
            ValueError: All shards were gone through and nothing in them is readable.
        """
        self.drawn += 1
        return next(self._pictures)

    def _decode(self) -> Iterator[Picture]:
        self._barren: set[int] = set()  # parts of shards that were gone through since the last picture
        for item in self._shuffle():
            try:
                picture = decoded(item, self.reading)
            except UnreadableImageError as error:
                self.failures[item.name] = str(error)
                continue
            self._barren.clear()
            yield picture

    def _shuffle(self) -> Iterator[Item]:
        """Items in the order of random draws from a buffer, which is emptied at the end of every pass over the shards."""
        draws = random.Random(f"{self.seed}/{self.number}")
        held: list[Item] = []
        size = 0
        for item in self._items():
            if item is not None:
                held.append(item)
                size += _bytes(item)
            while held and (item is None or len(held) >= self.buffer or size > self.reading.max_file_bytes):
                place = draws.randrange(len(held))
                held[place], held[-1] = held[-1], held[place]
                size -= _bytes(held[-1])
                yield held.pop()

    def _items(self) -> Iterator[Item | None]:
        """Items of this lane's shards; None between one pass and the next."""
        parts = -(-self.lanes // len(self.shards))  # of each shard
        total = parts * len(self.shards)
        last = 0
        for place in count(self.number, self.lanes):
            turn, rank = divmod(place, total)
            if turn != last:
                last = turn
                yield None
            unit = _order(total, f"{self.seed}/{turn}")[rank]
            shard, part = divmod(unit, parts)
            for index, item in enumerate(passable(self.shards, shard, self.failures)):
                if index % parts == part:
                    yield item
            self._barren.add(unit)
            if len(self._barren) == total:
                yield None  # what the buffer holds was not looked at
            if len(self._barren) == total:
                raise ValueError(
                    f"no image of the {len(self.shards)} shards {self.shards.name(0)} ... is readable: "
                    f"{_last(self.failures)}: correct data.root"
                )


def _order(total: int, seed: str) -> list[int]:
    stream = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return torch.randperm(total, generator=stream).tolist()


def _bytes(item: Item) -> int:
    return len(item.content) if isinstance(item.content, bytes) else 0


def _last(failures: dict[str, str]) -> str:
    return next((f"{name}: {failures[name]}" for name in reversed(failures)), "they are empty")


class StreamBatches(TrainBatches):
    """Positions of training batches of a stream: in order, numbered on through the epochs."""

    def __iter__(self) -> Iterator[list[int]]:
        """Batches from ``start`` on."""
        for batch in range(self.start, len(self)):
            first = self.epoch * self.count + batch * self.images + self.rank * self.batch_size
            yield list(range(first, first + self.batch_size))


class StreamSource:
    """Shuffled shards for training: positions of `StreamBatches` to full batches.

    Args:
        shards: The data set.
        reading: How pictures are read.
        epoch_size: Images per epoch, of all ranks together.
        images: Images per batch, of all ranks together.
        lanes: Streams that feed a batch; a divisor of ``images``.
        readers: Processes of a rank that read ahead. Each has its own lanes.
        seed: Of the order.
        buffer: See `Lane`.
        shuffle: False: every epoch is the first one.
    """

    def __init__(
        self,
        shards: Shards,
        reading: Reading,
        epoch_size: int,
        images: int,
        lanes: int,
        readers: int = 1,
        seed: int = 0,
        buffer: int = 64,
        shuffle: bool = True,
    ) -> None:
        self.shards, self.reading, self.epoch_size, self.images = shards, reading, epoch_size, images
        self.lanes, self.readers, self.seed, self.buffer, self.shuffle = lanes, readers, seed, buffer, shuffle
        self._open: dict[int, tuple[int, Lane]] = {}  # lane number to the epoch it is in and itself
        self._failures: dict[str, str] = {}

    def __len__(self) -> int:
        """Images per epoch."""
        return self.epoch_size

    def __getitems__(self, positions: list[int]) -> tuple[ImageBatch, dict[str, str]]:
        """Images ``[B, 3, size, size]`` in [0, 1], always as many as positions, and what was left out with the reasons."""
        self._failures.clear()
        pictures = [self._picture(position) for position in positions]
        return batch_of(pictures), dict(self._failures)

    def _picture(self, position: int) -> Picture:
        epoch, position = divmod(position, self.epoch_size)
        batch, row = divmod(position, self.images)
        rows = self.images // self.lanes  # of a batch that come from one lane
        number = row // rows * self.readers + batch % self.readers
        lane = self._lane(number, epoch if self.shuffle else 0, draw := batch // self.readers * rows + row % rows)
        while lane.drawn < draw:  # what a resumed run has seen already
            next(lane)
        return next(lane)

    def _lane(self, number: int, epoch: int, draw: int) -> Lane:
        opened, lane = self._open.get(number, (None, None))
        if lane is None or opened != epoch or lane.drawn > draw:
            lanes, seed = self.lanes * self.readers, f"{self.seed}/{epoch}"
            lane = Lane(self.shards, self.reading, number, lanes, seed, self.buffer, self._failures)
            self._open[number] = epoch, lane
        return lane


class SequentialSource:
    """The first images of a list of shards for evaluation, by position; going forward is cheap.

    Unreadable images are left out of a batch, but a batch never shrinks to nothing: ranks step together. If the shards hold
    less than ``size`` images, the first ones follow again, with the same ids (metrics count an id once).

    Args:
        shards: The data set.
        reading: How pictures are read.
        size: Images to take.
        role: Goes into the ids.
    """

    def __init__(self, shards: Shards, reading: Reading, size: int, role: str = "") -> None:
        self.shards, self.reading, self.size, self.role = shards, reading, size, role
        self._failures: dict[str, str] = {}
        self._stream: Iterator[Item] | None = None
        self._next = 0  # position of the item that the stream is before

    def __len__(self) -> int:
        """Images per evaluation."""
        return self.size

    def __getitems__(self, positions: list[int]) -> tuple[ImageBatch, dict[str, str]]:
        """Images ``[B, 3, size, size]`` in [0, 1], and what was left out with the reasons."""
        self._failures.clear()
        read = [self._picture(self._item(position)) for position in positions]
        tried: set[str] = set()
        while not any(read):
            item = self._item(self._next)
            if item.name in tried:
                raise ValueError(f"no image of {self._called()} is readable: {_last(self._failures)}")
            tried.add(item.name)
            read = [self._picture(item)]
        return batch_of([picture for picture in read if picture], self.role), dict(self._failures)

    def _item(self, position: int) -> Item:
        if self._stream is None or position < self._next:
            self._next, self._stream = 0, self._items()
        for _ in range(self._next, position):
            next(self._stream)
        self._next = position + 1
        return next(self._stream)

    def _picture(self, item: Item) -> Picture | None:
        try:
            return decoded(item, self.reading)
        except UnreadableImageError as error:
            self._failures[item.name] = str(error)
            return None

    def _items(self) -> Iterator[Item]:
        found = 0
        for turn in count():
            for shard in range(len(self.shards)):
                for item in passable(self.shards, shard, self._failures):
                    found += turn == 0
                    yield item
            if not found:
                raise ValueError(f"no image of {self._called()} is readable: {_last(self._failures)}")
            if turn == 0:
                shortage = f"{self._called()} hold {found} images, fewer than data.eval_size={self.size}"
                warnings.warn(f"{shortage}: the first ones follow again; lower data.init_args.eval_size", stacklevel=2)

    def _called(self) -> str:
        return f"the {len(self.shards)} shards {self.shards.name(0)} ..."
