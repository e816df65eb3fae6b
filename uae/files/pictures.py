"""Reading a picture from a file or from bytes: upright, in 8-bit RGB, within limits, and with one kind of error."""

from __future__ import annotations

import contextlib
import io
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Fit = Literal["crop", "pad", "squash"]
SUFFIXES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # no other decoder of Pillow gets to see a file
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 2**26


class UnreadableImageError(ValueError):
    """A picture is corrupted or cut off, in no known format, or above a limit. The message says which."""


@dataclass(frozen=True)
class Reading:
    """How pictures are read and made square. Calling it reads one.

    Args:
        size: Side of the square images that come out, in pixels.
        fit: How an image becomes square: "crop" its centre, "pad" it with white, or "squash" it.
        max_pixels: Pictures with more pixels are refused before they are decoded. Pillow itself allows 178 956 970.
        max_file_bytes: Larger files are refused before they are read, in bytes.
    """

    size: int
    fit: Fit = "crop"
    max_pixels: int = MAX_PIXELS
    max_file_bytes: int = MAX_FILE_BYTES

    def __call__(self, file: str | Path | bytes | BinaryIO) -> Tensor:
        """Read one picture.

        Args:
            file: A path, the bytes of a file, or an open file.

        Returns:
            Float ``[3, size, size]``, RGB in [0, 1]: upright, the first frame of an animation, white where transparent.

        Raises:
            UnreadableImageError: The picture cannot be read, whatever the reason.
        """
        picture = read_picture(file, self.max_pixels, self.max_file_bytes)
        return torch.from_numpy(np.array(_square(picture, self.size, self.fit))).permute(2, 0, 1).float() / 255


def read_picture(
    file: str | Path | bytes | BinaryIO, max_pixels: int = MAX_PIXELS, max_file_bytes: int = MAX_FILE_BYTES
) -> Image.Image:
    """Read one picture in its own size, in 8-bit RGB: upright, the first frame, white where transparent.

    Args:
        file: A path, the bytes of a file, or an open file.
        max_pixels: Pictures with more pixels are refused before they are decoded. Pillow itself allows 178 956 970.
        max_file_bytes: Larger files are refused before they are read, in bytes.

    Raises:
        UnreadableImageError: The picture cannot be read, whatever the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about files that are odd but readable, or large but below max_pixels
            return _decoded(_content(file, max_file_bytes), max_pixels)
    except UnidentifiedImageError:  # its message is a memory address
        raise UnreadableImageError(f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # hostile bytes make decoders raise anything: struct.error, KeyError, MemoryError, ...
        raise UnreadableImageError(f"{type(error).__name__}: {error}"[:300]) from error


def _content(file: str | Path | bytes | BinaryIO, limit: int) -> bytes:
    """All bytes of a file, which must be a regular one of at most ``limit`` bytes."""
    if isinstance(file, str | Path):
        status = Path(file).stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait forever
            raise ValueError("not a regular file")
        if status.st_size > limit:
            raise ValueError(f"{status.st_size} bytes are above max_file_bytes={limit}")
        return Path(file).read_bytes()
    content = file if isinstance(file, bytes) else file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"more bytes than max_file_bytes={limit}")
    return content


def _decoded(content: bytes, max_pixels: int) -> Image.Image:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels are above max_pixels={max_pixels}")
        image.load()
        with contextlib.suppress(Exception):  # a broken EXIF block does not make the pixels worse
            ImageOps.exif_transpose(image, in_place=True)
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in 8-bit RGB. Transparent parts become white; 16-bit and float values are scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion clips these at 255
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        top = 65535.0 if image.mode.startswith("I") else 1.0 if values.max() <= 1 else 255.0
        return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:  # as few copies as possible: an image may have max_pixels
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image)
        return canvas
    return image.convert("RGB")


def _square(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    bicubic = Image.Resampling.BICUBIC
    if fit == "crop":
        return ImageOps.fit(image, (size, size), bicubic)
    if fit == "squash":
        return image.resize((size, size), bicubic)
    width, height = (max(1, round(side * size / max(image.size))) for side in image.size)  # a line stays visible
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(image.resize((width, height), bicubic), ((size - width) // 2, (size - height) // 2))
    return canvas
