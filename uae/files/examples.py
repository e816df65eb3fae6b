"""What became of the same few images at several times: kept in a file, and drawn side by side."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import resize

from uae.files.tiles import Tile, grid, wrapped

SIDE = 256  # pixels; larger images are kept at this size


class Examples(TypedDict):
    """Some images at one time, in plain Python and tensors, as checkpoints hold them."""

    source: list[Tensor]  # each uint8 [3, H, W]
    caption: list[str]
    reconstruction: list[Tensor]


def none() -> Examples:
    """No images."""
    return {"source": [], "caption": [], "reconstruction": []}


def small(image_CHW: Tensor) -> Tensor:
    """An image in [0, 1] as uint8, not larger than what is kept."""
    image = image_CHW.detach().float().nan_to_num().clamp(0, 1).cpu()
    if max(image.shape[1:]) > SIDE:
        height, width = (max(1, round(side * SIDE / max(image.shape[1:]))) for side in image.shape[1:])
        image = resize(image, [height, width], antialias=True)
    return (image * 255).round().to(torch.uint8)


def save(file: Path, before: Examples, after: Examples) -> None:
    """Write the examples of a run."""
    torch.save({"before": before, "after": after}, file)


def load(file: Path) -> dict[str, Examples]:
    """The examples of a run: ``before`` and ``after``."""
    found: dict[str, Examples] = torch.load(file, weights_only=True)
    return found


def comparison(times: Mapping[str, Examples]) -> Image.Image:
    """A row per image: the source, then what was drawn of its caption at each time, with the caption below."""
    sources = next((one["source"] for one in times.values() if one["source"]), [])
    rows: list[list[Tile]] = []
    for number, source in enumerate(sources):
        row: list[Tile] = [(source / 255, ["source"])]
        for time, one in times.items():
            if number < len(one["caption"]):
                row.append((one["reconstruction"][number] / 255, [time, *wrapped(one["caption"][number])]))
        rows.append(row)
    return grid(rows)
