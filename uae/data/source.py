"""From images that a data set holds to batches: decoding, ids, splits, and what becomes of unreadable images."""

from __future__ import annotations

import hashlib
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from uae.data.captions import Caption, UnreadableCaptionError
from uae.data.sampler import Fetched
from uae.data.tally import Tally
from uae.files.pictures import Reading, UnreadableImageError
from uae.types import ImageBatch

NO_CAPTION = "it has no caption"


class Item(NamedTuple):
    """One image as a data set holds it, not decoded. The content is an error if the data set has found it to be unusable."""

    name: str
    content: bytes | Path | UnreadableImageError
    caption: Caption = None


class LeftOutError(UnreadableImageError):
    """What an `Item` holds instead of a picture if the data set leaves it out on purpose. The message is the reason."""


class Picture(NamedTuple):
    """One image, decoded: float ``[3, size, size]`` in [0, 1]."""

    name: str
    image: Tensor
    caption: str | None


def split_of(name: str, val_share: float, test_share: float) -> str:
    """The split that an image belongs to: "train", "val" or "test".

    It follows from a hash of the name, so no image changes its split when others are added or removed.

    Args:
        name: The name of the image in its data set.
        val_share: Share of all images that "val" gets, in [0, 1].
        test_share: Share of all images that "test" gets, in [0, 1].
    """
    place = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[8:16], "big") / 2**64
    return "test" if place < test_share else "val" if place < test_share + val_share else "train"


def id_of(name: str, role: str = "") -> int:
    """A whole number in [0, 2**48), the range of ids that metrics accept, from a hash of an image's name.

    Args:
        name: The name of the image in its data set.
        role: A prefix that tells data sets apart which may have the same names in them.
    """
    return int.from_bytes(hashlib.sha256(f"{role}{name}".encode("utf-8", "surrogatepass")).digest()[:6], "big")


def decoded(item: Item, reading: Reading, captioned: bool = False) -> Picture:
    """Decode an image.

    Args:
        item: The image.
        reading: How pictures are read.
        captioned: Whether an image without a caption counts as unreadable.

    Raises:
        UnreadableImageError: The image cannot be read, or its content is such an error.
    """
    if isinstance(item.content, UnreadableImageError):
        raise item.content
    if captioned and not isinstance(item.caption, str):
        raise UnreadableImageError(str(item.caption or NO_CAPTION))
    picture = reading(item.content)
    if isinstance(item.caption, UnreadableCaptionError):
        warnings.warn(f"image {item.name} comes without a caption: {item.caption}", stacklevel=2)
        return Picture(item.name, picture, None)
    return Picture(item.name, picture, item.caption)


def batch_of(pictures: list[Picture], role: str = "") -> ImageBatch:
    """Pictures as a batch with images ``[B, 3, size, size]``. It has captions if every picture has one.

    Args:
        pictures: The B pictures, at least one.
        role: The prefix of the names in ids, see `id_of`.
    """
    batch: ImageBatch = {
        "image": torch.stack([picture.image for picture in pictures]),
        "id": torch.tensor([id_of(picture.name, role) for picture in pictures]),
        "name": [picture.name for picture in pictures],
    }
    captions = [picture.caption for picture in pictures if picture.caption is not None]
    if len(captions) == len(pictures):
        batch["caption"] = captions
    return batch


class Items(ABC):
    """Images by position, not decoded: files of a folder, or rows of a table."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of images, including those that will turn out to be unreadable."""

    @abstractmethod
    def name(self, position: int) -> str:
        """The name of an image, without reading the image. It is the same on every machine."""

    @abstractmethod
    def item(self, position: int) -> Item:
        """An image and its caption.

        Raises:
            OSError: The image cannot be read.
            ValueError: What is read is corrupted.
        """


class PictureSource(Items):
    """Items that are decoded a batch at a time. Unreadable ones are left out and named.

    Args:
        reading: How pictures are read.
        role: The prefix of the names in ids, so that equal names in different data sets have different ids.
        replace: Whether the next readable image takes the place of an unreadable one, so that every batch is full.
            Otherwise batches shrink, but never to nothing, as all processes step together.
        captioned: Whether an image without a caption counts as unreadable.
    """

    def __init__(self, reading: Reading, role: str = "", replace: bool = False, captioned: bool = False) -> None:
        self.reading, self.role, self.replace, self.captioned = reading, role, replace, captioned
        self.tallies: list[Tally] = []  # what was found and skipped before anything was read
        self._failures: dict[str, str] = {}  # name to reason

    def __getitems__(self, positions: list[int]) -> Fetched:
        """The images at some positions as a batch ``[B, 3, size, size]``, and the newly found unreadable ones with reasons.

        Raises:
            ValueError: No image at all is readable.
        """
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
                return decoded(self.item(place), self.reading, self.captioned)
            except UnreadableImageError as error:
                self._failures[name] = str(error)
            except (OSError, ValueError) as error:
                self._failures[name] = f"{type(error).__name__}: {error}"[:300]
        if replace:
            raise ValueError(f"no image of these {len(self)} is readable; {name}: {self._failures[name]}: correct data.init_args.root")
        return None
