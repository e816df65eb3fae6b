"""A folder of images of any size and mode as a source of equal batches."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from uae.data.captions import CaptionFiles
from uae.types import ImageBatch

Fit = Literal["crop", "pad", "squash"]
SUFFIXES = {".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def list_images(root: str | Path, key: str) -> list[str]:
    """Relative names of the images below a folder, sorted; hidden files are left out.

    Raises:
        FileNotFoundError: The folder is missing or holds no image; the message names the configuration ``key``.
    """
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"{key}={str(root)!r} is not a folder: point {key} at a folder of images")
    files = [file.relative_to(folder) for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES]
    names = sorted(file.as_posix() for file in files if not any(part.startswith(".") for part in file.parts))
    if not names:
        raise FileNotFoundError(f"{key}={str(root)!r} holds no image ({', '.join(sorted(SUFFIXES))}): correct {key}")
    return names


def split_of(name: str, val_share: float, test_share: float) -> str:
    """Where a file belongs, by the hash of its relative name: adding or removing other files never moves it."""
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[8:16], "big") / 2**64
    return "test" if place < test_share else "val" if place < test_share + val_share else "train"


def id_of(name: str, role: str = "") -> int:
    """A stable id below 2**48 (what metrics accept) from a file's relative name and the folder it is relative to."""
    return int.from_bytes(hashlib.sha256(f"{role}{name}".encode()).digest()[:6], "big")


def read_image(file: str | Path, size: int, fit: Fit, max_pixels: int) -> Tensor:
    """One image as float ``[3, size, size]``, RGB in [0, 1]: upright, on white where transparent, first frame only.

    Raises:
        OSError, ValueError, SyntaxError: The file is corrupted, truncated, no image or above ``max_pixels``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is our limit
        image = Image.open(file)
    with image:
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels are above data.max_pixels={max_pixels}")
        image.load()
        picture = _resize(_as_rgb(ImageOps.exif_transpose(image)), size, fit)
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # Pillow's own conversion clips these at 255
        values = np.asarray(image, dtype=np.float64)
        top = 65535.0 if image.mode.startswith("I") else 1.0 if values.max() <= 1 else 255.0
        return Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _resize(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    bicubic = Image.Resampling.BICUBIC
    if fit == "crop":
        return ImageOps.fit(image, (size, size), bicubic)
    if fit == "pad":
        return ImageOps.pad(image, (size, size), bicubic, color="white")
    return image.resize((size, size), bicubic)


class FolderSource:
    """Files of a folder, read a batch at a time; unreadable ones are left out and named.

    Args:
        root: The folder.
        names: Relative names of its files.
        size: See `read_image`, like ``fit`` and ``max_pixels``.
        role: Goes into the ids, so that equal names in different folders differ.
        replace: Put the next readable file in the place of an unreadable one, so that every batch is full. Without it
            batches shrink, but never to nothing: ranks step together.
        captions: Where images have theirs; None for none.
    """

    def __init__(
        self,
        root: str,
        names: list[str],
        size: int,
        fit: Fit,
        max_pixels: int,
        role: str = "",
        replace: bool = False,
        captions: CaptionFiles | None = None,
    ) -> None:
        self.root, self.names, self.size, self.fit, self.max_pixels = root, names, size, fit, max_pixels
        self.role, self.replace, self.captions = role, replace, captions
        self._failures: dict[str, str] = {}

    def __len__(self) -> int:
        """Number of files, unreadable ones included."""
        return len(self.names)

    def __getitems__(self, positions: list[int]) -> tuple[ImageBatch, dict[str, str]]:
        """Images ``[B, 3, size, size]`` in [0, 1], their captions if all have one, and the files left out with the reasons."""
        before = set(self._failures)
        read = [self._read(position, self.replace) for position in positions]
        if not any(read):
            read = [self._read(positions[0], replace=True)]
        names, images = zip(*filter(None, read), strict=True)
        ids = torch.tensor([id_of(name, self.role) for name in names])
        failures = {name: reason for name, reason in self._failures.items() if name not in before}
        batch: ImageBatch = {"image": torch.stack(images), "id": ids, "name": list(names)}
        captions = [self.caption(name) for name in names]
        if None not in captions:
            batch["caption"] = captions  # type: ignore[typeddict-item]
        return batch, failures

    def caption(self, name: str) -> str | None:
        """The caption of a file, or None."""
        return None if self.captions is None else self.captions[name]

    def without_caption(self) -> list[str]:
        """Names of the files that have none."""
        return [name for name in self.names if self.caption(name) is None]

    def _read(self, position: int, replace: bool) -> tuple[str, Tensor] | None:
        """A file's name and image; None where it is unreadable and not to be replaced by the next readable one."""
        for step in range(len(self.names) if replace else 1):
            name = self.names[(position + step) % len(self.names)]
            if name in self._failures:
                continue
            try:
                return name, read_image(Path(self.root).expanduser() / name, self.size, self.fit, self.max_pixels)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
                self._failures[name] = f"{type(error).__name__}: {error}"
        if replace:
            raise ValueError(f"no image in {self.root} is readable; {name}: {self._failures[name]}")
        return None
