"""Detection of the objects in an image and of the colors that its prompt asks for."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from uae.bench.geneval.colors import ColorReader
from uae.bench.geneval.detection import Mask2Former
from uae.bench.geneval.prompts import CLASSES
from uae.bench.geneval.rules import objects_needing_color

NAME = "hf"  # results carry it, since these models and this post-processing are not the original's


class Detector:
    """Detects objects with Mask2Former and their colors with CLIP.

    Args:
        detector: Checkpoint of `uae.bench.geneval.detection.Mask2Former`.
        color_model: Architecture of `uae.bench.geneval.colors.ColorReader`.
        color_weights: Weights of the color model.
        device: Device of both models.
    """

    def __init__(self, detector: str, color_model: str, color_weights: str, device: torch.device) -> None:
        self.objects = Mask2Former(detector, device)
        self.colors = ColorReader(color_model, color_weights, device)
        self.backend: dict[str, Any] = {"name": NAME, **self.objects.backend, **self.colors.backend}

    def __call__(self, image: Image.Image, metadata: dict[str, Any]) -> dict[str, list[list[Any]]]:
        """Class to its detections: left, top, right, bottom, score, color; the color is None if the prompt does not ask for it.

        Args:
            image: RGB, upright.
            metadata: Line of the prompt file.
        """
        seen = self.objects(image)
        places: dict[str, list[int]] = {}
        for place, label in enumerate(seen.labels_M.tolist()):
            places.setdefault(CLASSES[label], []).append(place)
        scores, boxes = seen.scores_M.tolist(), seen.boxes_M4.tolist()
        found = {name: [[*boxes[i], scores[i], None] for i in some] for name, some in places.items()}
        asked = objects_needing_color(metadata, {name: [scores[i] for i in some] for name, some in places.items()})
        for name, kept in asked.items():
            chosen = [places[name][i] for i in kept]
            masks = [seen.masks_MHW[i].cpu().numpy() for i in chosen]
            for i, color in zip(kept, self.colors(image, [boxes[j] for j in chosen], masks, name), strict=True):
                found[name][i][5] = color
        return found


def read_upright(path: Path) -> Image.Image:
    """Read an image file as RGB, rotated as its EXIF data say.

    Raises:
        OSError, ValueError, SyntaxError: The file is not a complete image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(path) as image:
                return ImageOps.exif_transpose(image).convert("RGB")
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            raise ValueError(str(error)) from error
