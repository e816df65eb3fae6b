"""HTML from templates in this folder. Everything that is put into a template is escaped; pictures become part of the page."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from uae.files.whole import write_whole

SIDE = 256  # pixels; larger pictures are made smaller
PIXELATED = 64  # pixels; smaller pictures are kept exactly, because each of their pixels is seen


def write_page(path: Path, template: str, **content: Any) -> None:
    """Fill a template and write the page, whole or not at all.

    Args:
        path: The HTML file.
        template: Name of a file in the folder of this module.
        **content: Values by their names in the template.
    """
    places = FileSystemLoader(Path(__file__).parent)
    templates = Environment(loader=places, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = templates.get_template(template).render(content)
    write_whole(path, text.encode("utf-8", "backslashreplace"))  # names of files may hold halves of characters


def embedded(image: Image.Image, side: int = SIDE) -> str:
    """A picture as a ``data:`` address: small ones as PNG, larger ones as JPEG of at most ``side`` pixels."""
    file, small = BytesIO(), max(image.size) <= PIXELATED
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    image.convert("RGB").save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 85}))
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode()}"


def embedded_tensor(image_CHW: Tensor, side: int = SIDE) -> str:
    """The same of a uint8 image ``[3, H, W]``."""
    assert image_CHW.dtype == torch.uint8, "floats would be scaled"
    return embedded(to_pil_image(image_CHW), side)
