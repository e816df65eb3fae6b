"""From images in [0, 1] to the pixels that an image tower was trained on: resized, cropped and normalised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch.nn.functional as F
from torch import Tensor

_PIL_RESAMPLE = {2: "bilinear", 3: "bicubic"}


@dataclass(frozen=True)
class Preprocessing:
    """Resize, crop the centre, normalise; for batches, on any device, and differentiable.

    The official image processors round to 8 bits after resizing. Calling this object stays in float instead, so that
    gradients pass; a pixel then differs by less than 1/255. `of_bytes` rounds as the official processors do, bit for bit,
    and is what benchmarks use.

    Args:
        resize: Length of the short side after resizing, in pixels; or ``(height, width)``, whatever the proportions were;
            or None for no resizing.
        crop: ``(height, width)`` of the centre crop in pixels, or None for no crop. Smaller images are padded with black.
        mean: Mean of every channel that is subtracted, in units of [0, 1].
        std: Standard deviation of every channel that is divided by, in units of [0, 1].
        interpolation: "bicubic" or "bilinear"; always with antialiasing, as Pillow does.
        offset: Function that turns the fractional offset of the crop into a whole pixel: ``int`` (transformers) or
            ``round`` (torchvision).
        rounded: Whether `of_bytes` rounds to 8 bits after resizing. The official processor of DINOv3 is the only one that
            does not.
    """

    resize: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    offset: Callable[[float], int] = int
    rounded: bool = True

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        """Turn float images ``[N, 3, H, W]`` in [0, 1] into the float32 pixels ``[N, 3, h, w]`` of the tower."""
        return self._normalised(self._cropped(self._resized(images_NCHW.float())))

    def of_bytes(self, image_3HW: Tensor) -> Tensor:
        """Turn one uint8 image ``[3, H, W]`` into the float32 pixels ``[3, h, w]`` of the tower, as the official one does."""
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
        """Height and width of an image after resizing."""
        if not isinstance(self.resize, int):
            return self.resize or (height, width)
        short = min(height, width)  # the long side is truncated, not rounded, in transformers and torchvision alike
        return int(self.resize * height / short), int(self.resize * width / short)

    def _resized(self, images: Tensor) -> Tensor:
        size = self._size(*images.shape[-2:])
        if size == tuple(images.shape[-2:]):
            return images
        resized = F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=True)
        return resized.clamp(0, 1)  # bicubic overshoots at edges; pipelines in 8 bits cut that off, too

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
    """The preprocessing of an image processor of transformers.

    Args:
        numbers: The settings of the processor: its ``to_dict()``, which is what ``preprocessor_config.json`` holds.

    Raises:
        ValueError: The settings ask for a resize rule, a filter or a range of values that is not implemented here.
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


def from_open_clip(numbers: Mapping[str, Any]) -> Preprocessing:
    """The preprocessing of a model of open_clip.

    Args:
        numbers: The settings of its image tower: ``model.visual.preprocess_cfg``.

    Raises:
        ValueError: The settings ask for a resize rule that is not implemented here.
    """
    size = numbers["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    mode = numbers["resize_mode"]
    if mode not in ("shortest", "squash") or (mode == "shortest" and height != width):
        raise ValueError(
            f"open_clip preprocessing resize_mode={mode}, size={size}; supported: shortest (square), squash; "
            "set the encoder's init_args.name to another model"
        )
    return Preprocessing(
        resize=height if mode == "shortest" else (height, width),
        crop=(height, width) if mode == "shortest" else None,
        mean=tuple(numbers["mean"]),
        std=tuple(numbers["std"]),
        interpolation=numbers["interpolation"],
        offset=round,
    )


def _resize_rule(size: int | Mapping[str, int | None]) -> int | tuple[int, int]:
    if isinstance(size, int):
        return size
    given = {key: value for key, value in size.items() if value is not None}
    if set(given) == {"shortest_edge"}:
        return given["shortest_edge"]
    if set(given) == {"height", "width"}:
        return given["height"], given["width"]
    raise ValueError(f"preprocessor_config.json has size={given}; supported: shortest_edge, or height and width")


def _height_width(size: int | Mapping[str, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size["height"], size["width"])


def _interpolation(resample: object) -> str:
    value = resample.value if isinstance(resample, Enum) else resample
    name = _PIL_RESAMPLE.get(value) if isinstance(value, int) else value
    if name not in _PIL_RESAMPLE.values():
        raise ValueError(f"preprocessor_config.json has resample={resample}; supported: 2 (bilinear) and 3 (bicubic)")
    return str(name)
