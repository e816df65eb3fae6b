"""A file or its bytes to one picture: upright, 8-bit RGB, within limits, and one kind of error whatever a decoder meets."""

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
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of Pillow's decoders, no other sees a byte
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 2**26


class UnreadableImageError(ValueError):
    """A picture is corrupted, truncated, of no known format or above a limit. The message says which."""


@dataclass(frozen=True)
class Reading:
    """How pictures are read.

    Args:
        size: Side of the square images that come out, in pixels.
        fit: How an image becomes square: "crop" its centre, "pad" with white, or "squash".
        max_pixels: Larger pictures are refused before they are decoded; above 178 956 970 Pillow refuses in any case.
        max_file_bytes: Larger files are refused before they are read.
    """

    size: int
    fit: Fit = "crop"
    max_pixels: int = MAX_PIXELS
    max_file_bytes: int = MAX_FILE_BYTES

    def __call__(self, file: str | Path | bytes | BinaryIO) -> Tensor:
        """One image as float ``[3, size, size]``, RGB in [0, 1]: upright, on white where transparent, first frame only.

        Raises:
            UnreadableImageError: For any reason.
        """
        picture = read_picture(file, self.max_pixels, self.max_file_bytes)
        return torch.from_numpy(np.array(_square(picture, self.size, self.fit))).permute(2, 0, 1).float() / 255


def read_picture(
    file: str | Path | bytes | BinaryIO, max_pixels: int = MAX_PIXELS, max_file_bytes: int = MAX_FILE_BYTES
) -> Image.Image:
    """One image of its own size, 8-bit RGB; otherwise as `Reading`.

    Raises:
        UnreadableImageError: For any reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd but readable is no news; max_pixels is our limit
            return _decoded(_content(file, max_file_bytes), max_pixels)
    except UnidentifiedImageError:  # its message is a memory address
        raise UnreadableImageError(f"none of {', '.join(FORMATS)}") from None
    except Exception as error:  # hostile bytes make decoders raise anything: struct.error, KeyError, MemoryError, ...
        raise UnreadableImageError(f"{type(error).__name__}: {error}"[:300]) from error


def _content(file: str | Path | bytes | BinaryIO, limit: int) -> bytes:
    """All bytes of a file, if it is a regular one of at most ``limit`` bytes."""
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
    """8-bit RGB of any mode: transparent parts on white, 16 bits and floats scaled."""
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
