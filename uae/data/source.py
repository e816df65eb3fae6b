"""Pictures by position as a source of equal batches: unreadable ones are left out, named, and replaced where asked."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from uae.files.pictures import Reading, UnreadableImageError
from uae.types import ImageBatch


class Item(NamedTuple):
    """One image as a data set holds it, not decoded."""

    name: str
    content: bytes | Path | UnreadableImageError
    caption: str | None = None


class Picture(NamedTuple):
    """One image, decoded: float ``[3, size, size]`` in [0, 1]."""

    name: str
    image: Tensor
    caption: str | None


def split_of(name: str, val_share: float, test_share: float) -> str:
    """Where an image belongs, by the hash of its name: adding or removing others never moves it."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[8:16], "big") / 2**64
    return "test" if place < test_share else "val" if place < test_share + val_share else "train"


def id_of(name: str, role: str = "") -> int:
    """A stable id below 2**48 (what metrics accept) from an image's name and the data set it is named in."""
    return int.from_bytes(hashlib.sha256(f"{role}{name}".encode()).digest()[:6], "big")


def decoded(item: Item, reading: Reading) -> Picture:
    """The picture of an item.

    Raises:
        UnreadableImageError: There is none.
    """
    if isinstance(item.content, UnreadableImageError):
        raise item.content
    return Picture(item.name, reading(item.content), item.caption)


def batch_of(pictures: list[Picture], role: str = "") -> ImageBatch:
    """Pictures as a batch ``[B, 3, size, size]``, with their captions if all have one."""
    batch: ImageBatch = {
        "image": torch.stack([picture.image for picture in pictures]),
        "id": torch.tensor([id_of(picture.name, role) for picture in pictures]),
        "name": [picture.name for picture in pictures],
    }
    captions = [picture.caption for picture in pictures if picture.caption is not None]
    if len(captions) == len(pictures):
        batch["caption"] = captions
    return batch


class PictureSource:
    """Pictures by position; subclasses know where they are.

    Args:
        reading: How they are read.
        role: Goes into the ids, so that equal names in different data sets differ.
        replace: Put the next readable image in the place of an unreadable one, so that every batch is full. Without it
            batches shrink, but never to nothing: ranks step together.
    """

    def __init__(self, reading: Reading, role: str = "", replace: bool = False) -> None:
        self.reading, self.role, self.replace = reading, role, replace
        self._failures: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of images, unreadable ones included."""
        raise NotImplementedError

    def name(self, position: int) -> str:
        """Of the image at a position, without reading it."""
        raise NotImplementedError

    def item(self, position: int) -> Item:
        """The image at a position, not decoded. May raise OSError or ValueError."""
        raise NotImplementedError

    def __getitems__(self, positions: list[int]) -> tuple[ImageBatch, dict[str, str]]:
        """Images ``[B, 3, size, size]`` in [0, 1], their captions if all have one, and what was left out with the reasons."""
        before = set(self._failures)
        read = [self._read(position, self.replace) for position in positions]
        if not any(read):
            read = [self._read(positions[0], replace=True)]
        failures = {name: reason for name, reason in self._failures.items() if name not in before}
        return batch_of([picture for picture in read if picture], self.role), failures

    def _read(self, position: int, replace: bool) -> Picture | None:
        """The picture; None where it is unreadable and not to be replaced by the next readable one."""
        name = ""
        for step in range(len(self) if replace else 1):
            place = (position + step) % len(self)
            name = self.name(place)
            if name in self._failures:
                continue
            try:
                return decoded(self.item(place), self.reading)
            except UnreadableImageError as error:
                self._failures[name] = str(error)
            except (OSError, ValueError) as error:
                self._failures[name] = f"{type(error).__name__}: {error}"[:300]
        if replace:
            raise ValueError(f"no image of these {len(self)} is readable; {name}: {self._failures[name]}: correct data.root")
        return None
