"""From float images in [0, 1] to what an image tower was trained on; differentiable, batched, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_PIL_RESAMPLE = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop, normalise. Sources and reconstructions go through the same arithmetic, so identity scores 1.

    The official pipelines round to 8 bit after resizing; this one stays in float (a difference below 1/255 per pixel)
    so that gradients pass. `of_bytes` is the official arithmetic, bit for bit: what benchmarks look through.

    Args:
        resize: Short side in pixels, or ``(height, width)`` for a direct resize, or None.
        crop: ``(height, width)`` of the centre crop, or None. Smaller images are padded with zeros (black).
        mean: Per-channel mean, in [0, 1] units.
        std: Per-channel standard deviation, in [0, 1] units.
        interpolation: "bicubic" or "bilinear"; always antialiased, as PIL does.
        offset: Turns the crop's fractional offset into a pixel: ``int`` (transformers) or ``round`` (torchvision).
        rounded: Whether `of_bytes` rounds to 8 bit after resizing. All official processors do but DINOv3's.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    offset: Callable[[float], int] = int
    rounded: bool = True

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """float32 ``[N, 3, H, W]`` in [0, 1] to the tower's ``[N, 3, h, w]``."""
        return self._normalised(self._cropped(self._resized(images_NCHW.float())))

    def of_bytes(self, image_3HW: Tensor) -> Tensor:
        """uint8 ``[3, H, W]`` to the tower's float32 ``[3, h, w]``, in the official processors' own order and rounding."""
        from torchvision.transforms.v2 import functional as pixelwise

        image = image_3HW if self.rounded else image_3HW.float() / 255
        size = self._size(*image.shape[-2:])
        image = pixelwise.resize(image, list(size), pixelwise.InterpolationMode(self.interpolation), antialias=True)
        pixels = self._cropped(image[None]).float()
        return self._normalised(pixels / 255 if self.rounded else pixels)[0]

    def _normalised(self, pixels: Tensor) -> Tensor:
        mean, std = (pixels.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (pixels - mean) / std

    def _size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        short = min(height, width)  # the long side is truncated, not rounded, in transformers and torchvision alike
        return int(self.resize * height / short), int(self.resize * width / short)

    def _resized(self, images: Tensor) -> Tensor:
        size = self._size(*images.shape[-2:])
        if size == tuple(images.shape[-2:]):
            return images
        resized = F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
        return resized.clamp(0, 1)  # bicubic overshoots at edges; 8-bit pipelines saturate there too

    def _cropped(self, images: Tensor) -> Tensor:
        if self.crop is None:
            return images
        height, width = self.crop
        down, right = max(0, height - images.shape[-2]), max(0, width - images.shape[-1])
        images = F.pad(images, (right // 2, (right + 1) // 2, down // 2, (down + 1) // 2))
        top = self.offset((images.shape[-2] - height) / 2)
        left = self.offset((images.shape[-1] - width) / 2)
        return images[..., top : top + height, left : left + width]


def from_image_processor(numbers: Mapping[str, Any]) -> Preprocessing:
    """The numbers of a transformers image processor (its ``to_dict()``, i.e. ``preprocessor_config.json``).

    Raises:
        ValueError: A resize rule, filter or value range that is not implemented here.
    """
    if not numbers.get("do_rescale", True):
        raise ValueError("preprocessor_config.json has do_rescale=false; only towers that expect [0, 1] are supported")
    return Preprocessing(
        resize=_resize_rule(numbers["size"]) if numbers.get("do_resize") else None,
        crop=_height_width(numbers["crop_size"]) if numbers.get("do_center_crop") else None,
        mean=tuple(numbers["image_mean"]) if numbers.get("do_normalize") else (0.0, 0.0, 0.0),
        std=tuple(numbers["image_std"]) if numbers.get("do_normalize") else (1.0, 1.0, 1.0),
        interpolation=_interpolation(numbers.get("resample")),
        rounded=not str(numbers.get("image_processor_type")).startswith("DINOv3"),
    )


def _resize_rule(size: Any) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    given = {key: value for key, value in dict(size).items() if value is not None}
    if set(given) == {"shortest_edge"}:
        return int(given["shortest_edge"])
    if set(given) == {"height", "width"}:
        return int(given["height"]), int(given["width"])
    raise ValueError(f"preprocessor_config.json has size={given}; supported: shortest_edge, or height and width")


def _height_width(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size["height"]), int(size["width"]))


def _interpolation(resample: Any) -> str:
    name = _PIL_RESAMPLE.get(resample) if isinstance(resample, int) else getattr(resample, "value", resample)
    if name not in _PIL_RESAMPLE.values():
        raise ValueError(f"preprocessor_config.json has resample={resample}; supported: 2 (bilinear) and 3 (bicubic)")
    return str(name)
