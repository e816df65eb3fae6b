"""Images from clients outside this process: their formats, and a cache on disk."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from uae.files.pictures import UnreadableImageError, as_rgb, read_picture
from uae.models.renderers.clients import KEY


def picture_of(answer: Any) -> Image.Image:
    """Convert the answer of a client to an RGB image with 8 bits per channel.

    Args:
        answer: The content of an image file (bytes), a PIL image, or a tensor ``[3, H, W]`` (uint8, or float in [0, 1]).

    Raises:
        ValueError: The answer is of another type, shape or range.
    """
    if isinstance(answer, bytes):
        return read_picture(answer)
    if isinstance(answer, Image.Image):
        return as_rgb(answer)
    if not isinstance(answer, Tensor):
        raise ValueError(f"the client answered {type(answer).__name__}; allowed: bytes, PIL.Image, Tensor [3, H, W]")
    pixels = answer.detach().cpu()
    if pixels.is_floating_point() and bool(((pixels >= 0) & (pixels <= 1)).all()):  # no NaN either
        pixels = (pixels.float() * 255).round().to(torch.uint8)
    if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype is not torch.uint8:
        raise ValueError(f"the client answered a tensor {answer.dtype} {list(answer.shape)}; allowed: [3, H, W], uint8 or in [0, 1]")
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def as_pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    """The image as float32 ``[3, height, width]`` in [0, 1], resized (bicubic, antialiased) without keeping its aspect ratio."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


class PictureCache:
    """Images on disk by the request that made them. Several threads and processes may use it at the same time.

    Args:
        folder: Folder of the images. It is created when the first image is written.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser()

    def check_writable(self) -> None:
        """Raise before requests are paid for whose images could not be kept.

        Raises:
            ValueError: No file can be written to the folder.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"cache={str(self.folder)!r} cannot be written ({error.strerror}), so that images would be lost; set {KEY}.cache"
            ) from error

    def file(self, *key: str | int) -> Path:
        """Path of the image of a key, whether or not the file exists."""
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.png"

    def read(self, *key: str | int) -> Image.Image | None:
        """The image of a key; None if it does not exist or its file is damaged."""
        try:
            return read_picture(self.file(*key))
        except UnreadableImageError:
            return None

    def write(self, picture: Image.Image, *key: str | int) -> None:
        """Write an image as PNG. A process that is killed meanwhile leaves a .part file, never an incomplete image."""
        file = self.file(*key)
        file.parent.mkdir(parents=True, exist_ok=True)
        handle, part = tempfile.mkstemp(dir=file.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as stream:
                picture.save(stream, format="PNG")
            os.replace(part, file)
        except BaseException:
            Path(part).unlink(missing_ok=True)
            raise
