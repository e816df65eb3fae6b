"""Pictures made outside this process: what clients answer with, and keeping it on disk."""

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


def picture_of(answer: Any) -> Image.Image:
    """What a client may answer with, as one RGB picture of 8 bit.

    Args:
        answer: The content of an image file (bytes); a PIL image; a tensor ``[3, H, W]``, uint8 or float in [0, 1].

    Raises:
        ValueError: Something else.
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
        raise ValueError(
            f"the client answered a tensor {answer.dtype} {list(answer.shape)}; allowed: [3, H, W], uint8 or in [0, 1]"
        )
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def as_pixels(picture: Image.Image, height: int, width: int) -> Tensor:
    """float32 ``[3, height, width]`` in [0, 1]; another size is resized (bicubic, antialiased), whatever its aspect."""
    if picture.size != (width, height):
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


class PictureCache:
    """Pictures on disk, filed under what they were asked for. Safe for several threads and processes at once.

    Args:
        folder: Made when the first picture is kept.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder).expanduser()

    def file(self, *key: str | int) -> Path:
        """Where the picture of a key is, or would be."""
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.png"

    def read(self, *key: str | int) -> Image.Image | None:
        """The picture of a key; None if there is none or its file is damaged."""
        try:
            return read_picture(self.file(*key))
        except UnreadableImageError:
            return None

    def write(self, picture: Image.Image, *key: str | int) -> None:
        """Keep a picture, without loss. A process killed meanwhile leaves a .part file, never half a picture."""
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
