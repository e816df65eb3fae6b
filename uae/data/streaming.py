"""Data that can only be read from front to back: as many batches on every process, a seeded order, resumable anywhere.

A data set is a list of shards. Every epoch, and every pass over the shards within an epoch, has its own order of them. The
shards are dealt out to lanes; a lane reads its shards one after the other, and draws images from a buffer that it keeps
filled. A position that `StreamBatches` hands out says which lane an image comes from and how many images that lane has drawn
before. So processes and workers need not talk to each other, and a resumed run reads its lanes up to where they were (in the
current epoch only) and goes on.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple, Protocol

import torch

from uae.data.sampler import Fetched, TrainBatches
from uae.data.source import Item, LeftOutError, Picture, batch_of, decoded
from uae.data.tally import Tally
from uae.files.pictures import Reading, UnreadableImageError


class Shards(Protocol):
    """A data set in parts, each of which is read from front to back."""

    def __len__(self) -> int: ...
    def name(self, shard: int) -> str:
        """The name of a shard, the same on every machine."""
        ...

    def items(self, shard: int) -> Iterator[Item]:
        """The images of a shard in order. May raise anything: the rest of the shard is then left out."""
        ...


def passable(shards: Shards, shard: int, failures: dict[str, str], tallies: dict[str, Tally] | None = None) -> Iterator[Item]:
    """The images of a shard up to where it is broken, without what is left out on purpose.

    Args:
        shards: The data set.
        shard: The number of the shard.
        failures: Receives the name of the shard and what was wrong, if it is broken.
        tallies: Receives the name of the shard, and what was found in it so far.
    """
    tally = Tally(0)
    try:
        for item in shards.items(shard):
            if tallies is not None:
                tallies[shards.name(shard)] = tally
            if isinstance(item.content, LeftOutError):
                tally.skip_one(item.name, str(item.content))
            else:
                tally.found += 1
                yield item
    except Exception as error:  # whatever libraries, file systems and networks raise: training goes on without it
        failures[shards.name(shard)] = f"{type(error).__name__}: {error}"[:300]


class Notes(NamedTuple):
    """What came to light since the last batch: unreadable images and shards with reasons, and what shards hold so far."""

    failures: dict[str, str]
    tallies: dict[str, Tally]

    def clear(self) -> None:
        """Begin with a new batch."""
        self.failures.clear()
        self.tallies.clear()

    def fetched(self, pictures: list[Picture], role: str = "") -> Fetched:
        """Pictures as a batch, with a copy of the notes."""
        return batch_of(pictures, role), dict(self.failures), {f"{role}{shard}": tally for shard, tally in self.tallies.items()}


class Lane:
    """An endless stream of readable pictures from every ``lanes``-th shard of a shuffled list that is repeated.

    If there are fewer shards than lanes, several lanes read the same shard, and each takes every so-many-th image of it.

    Args:
        shards: The data set.
        reading: How pictures are read.
        number: The number of this lane, in [0, lanes).
        lanes: The number of lanes that share the data set.
        seed: Seed of the order of the shards, which is the same for all lanes, and of the draws from the buffer.
        buffer: The number of images in the buffer; fewer if they have more than ``reading.max_file_bytes`` together.
        notes: Receives what could not be read, and what was found.
        captioned: Whether an image without a caption counts as unreadable.
    """

    def __init__(
        self,
        shards: Shards,
        reading: Reading,
        number: int,
        lanes: int,
        seed: str,
        buffer: int,
        notes: Notes,
        captioned: bool = False,
    ) -> None:
        self.shards, self.reading, self.number, self.lanes = shards, reading, number, lanes
        self.seed, self.buffer, self.notes, self.captioned = seed, buffer, notes, captioned
        self.drawn = 0  # pictures that were asked for
        self._pictures = self._decode()

    def __next__(self) -> Picture:
        """The next picture.

        Raises:
            ValueError: All shards were gone through, and nothing in them is readable.
        """
        self.drawn += 1
        return next(self._pictures)

    def _decode(self) -> Iterator[Picture]:
        for item in self._shuffle():
            try:
                yield decoded(item, self.reading, self.captioned)
            except UnreadableImageError as error:
                self.notes.failures[item.name] = str(error)

    def _shuffle(self) -> Iterator[Item]:
        """Items in the order of random draws from a buffer, which is emptied wherever `_items` yields None."""
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
        """Items of this lane's shards, and None between one pass over the shards and the next."""
        parts = -(-self.lanes // len(self.shards))  # of each shard
        total = parts * len(self.shards)
        last = 0
        wanted, searched = 1, set[int]()  # the picture that is looked for, and the parts that were gone through for it
        for place in count(self.number, self.lanes):
            turn, rank = divmod(place, total)
            if turn != last:
                last = turn
                yield None
            unit = _order(total, f"{self.seed}/{turn}")[rank]
            shard, part = divmod(unit, parts)
            for index, item in enumerate(passable(self.shards, shard, self.notes.failures, self.notes.tallies)):
                if index % parts == part:
                    yield item
            if self.drawn > wanted:
                wanted, searched = self.drawn, set()
            searched.add(unit)
            if len(searched) == total:
                yield None  # the buffer may still hold a readable one
                if self.drawn == wanted:
                    raise ValueError(nothing_readable(self.shards, self.notes.failures))


def nothing_readable(shards: Shards, failures: dict[str, str]) -> str:
    """The message for a data set in which no image can be read, with the last thing that went wrong."""
    last = next((f"{name}: {failures[name]}" for name in reversed(failures)), "they are empty")
    return (
        f"no image of the {len(shards)} shards {shards.name(0)} ... is readable: {last}: correct data.init_args.root "
        "(or val_root, test_root, predict_root)"
    )


def _order(total: int, seed: str) -> list[int]:
    stream = torch.Generator().manual_seed(random.Random(seed).getrandbits(63))
    return torch.randperm(total, generator=stream).tolist()


def _bytes(item: Item) -> int:
    return len(item.content) if isinstance(item.content, bytes) else 0


class StreamBatches(TrainBatches):
    """Positions of training batches of a stream: one after the other, counted on through the epochs."""

    def __iter__(self) -> Iterator[list[int]]:
        """The batches from number ``start`` on."""
        for batch in range(self.start, len(self)):
            first = self.epoch * self.count + batch * self.images + self.rank * self.batch_size
            yield list(range(first, first + self.batch_size))


class StreamSource:
    """The training images of shuffled shards, by the positions of `StreamBatches`. Every batch is full.

    Args:
        shards: The data set.
        reading: How pictures are read.
        epoch_size: The number of images in an epoch, of all processes together.
        images: The number of images in a batch, of all processes together.
        lanes: The number of lanes that feed a batch; a divisor of ``images``.
        readers: The number of worker processes that read ahead for one process; each has its own lanes. 1 if there is none.
        seed: Seed of the order.
        buffer: The number of images that each lane draws from, see `Lane`.
        shuffle: Whether every epoch has its own order. Otherwise every epoch is the first one again.
        captioned: Whether an image without a caption counts as unreadable.
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
        captioned: bool = False,
    ) -> None:
        self.shards, self.reading, self.epoch_size, self.images = shards, reading, epoch_size, images
        self.lanes, self.readers, self.seed, self.buffer, self.shuffle = lanes, readers, seed, buffer, shuffle
        self.captioned = captioned
        self.tallies: list[Tally] = []  # what was found and skipped before anything was read
        self._open: dict[int, tuple[int, Lane]] = {}  # number of a lane to the epoch that it reads, and the lane
        self._notes = Notes({}, {})

    def __len__(self) -> int:
        """The number of images in an epoch."""
        return self.epoch_size

    def __getitems__(self, positions: list[int]) -> Fetched:
        """The images at some positions as a batch ``[B, 3, size, size]``, and what was unreadable, with the reasons.

        Raises:
            ValueError: Nothing in the shards is readable.
        """
        self._notes.clear()
        return self._notes.fetched([self._picture(position) for position in positions])

    def _picture(self, position: int) -> Picture:
        epoch, position = divmod(position, self.epoch_size)
        batch, row = divmod(position, self.images)
        rows = self.images // self.lanes  # of a batch that come from one lane
        number = row // rows * self.readers + batch % self.readers
        draw = batch // self.readers * rows + row % rows
        lane = self._lane(number, epoch if self.shuffle else 0, draw)
        while lane.drawn < draw:  # what a resumed run has seen already
            next(lane)
        return next(lane)

    def _lane(self, number: int, epoch: int, draw: int) -> Lane:
        """The lane of a number, opened anew in every epoch, and where an earlier draw is asked for."""
        opened = self._open.get(number)
        if opened is not None and opened[0] == epoch and opened[1].drawn <= draw:
            return opened[1]
        lanes, seed = self.lanes * self.readers, f"{self.seed}/{epoch}"
        lane = Lane(self.shards, self.reading, number, lanes, seed, self.buffer, self._notes, self.captioned)
        self._open[number] = epoch, lane
        return lane


class SequentialSource:
    """The first images of a list of shards, for evaluation. Asking for them in order is cheap.

    Unreadable images are left out of a batch, but a batch never shrinks to nothing, as all processes step together. If the
    shards hold fewer images than asked for, the first ones follow again with the same ids; metrics count an id once.

    Args:
        shards: The data set.
        reading: How pictures are read.
        size: The number of images.
        role: The prefix of the names in ids, see `uae.data.source.id_of`.
        captioned: Whether an image without a caption counts as unreadable.
    """

    def __init__(self, shards: Shards, reading: Reading, size: int, role: str = "", captioned: bool = False) -> None:
        self.shards, self.reading, self.size, self.role, self.captioned = shards, reading, size, role, captioned
        self.tallies: list[Tally] = []  # what was found and skipped before anything was read
        self._notes = Notes({}, {})
        self._stream: Iterator[Item] | None = None
        self._next = 0  # position of the item that the stream yields next

    def __len__(self) -> int:
        """The number of images."""
        return self.size

    def __getitems__(self, positions: list[int]) -> Fetched:
        """The images at some positions as a batch ``[B, 3, size, size]``, and what was unreadable, with the reasons.

        Raises:
            ValueError: Nothing in the shards is readable.
        """
        self._notes.clear()
        read = [self._picture(self._item(position)) for position in positions]
        tried: set[str] = set()
        while not any(read):
            item = self._item(self._next)
            if item.name in tried:
                raise ValueError(nothing_readable(self.shards, self._notes.failures))
            tried.add(item.name)
            read = [self._picture(item)]
        return self._notes.fetched([picture for picture in read if picture], self.role)

    def _item(self, position: int) -> Item:
        if self._stream is None or position < self._next:
            self._next, self._stream = 0, self._items()
        for _ in range(self._next, position):
            next(self._stream)
        self._next = position + 1
        return next(self._stream)

    def _picture(self, item: Item) -> Picture | None:
        try:
            return decoded(item, self.reading, self.captioned)
        except UnreadableImageError as error:
            self._notes.failures[item.name] = str(error)
            return None

    def _items(self) -> Iterator[Item]:
        """The items of all shards, again and again."""
        found = 0
        for turn in count():
            for shard in range(len(self.shards)):
                for item in passable(self.shards, shard, self._notes.failures, self._notes.tallies):
                    found += turn == 0
                    yield item
            if not found:
                raise ValueError(nothing_readable(self.shards, self._notes.failures))
            if turn == 0 and found < self.size:
                warnings.warn(
                    f"the {len(self.shards)} shards {self.shards.name(0)} ... hold {found} images, fewer than "
                    f"data.init_args.eval_size={self.size}: the first ones follow again; lower data.init_args.eval_size",
                    stacklevel=2,
                )
