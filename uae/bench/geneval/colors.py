"""Colors of detected objects by CLIP, as GenEval determines them: each object alone on gray is classified into ten colors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from uae.bench.fingerprints import weights_digest
from uae.bench.geneval.rules import COLORS
from uae.files.locations import here

MODEL, WEIGHTS = "ViT-L-14-quickgelu", "openai"
GRAY = "#999"
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorReader:
    """Zero-shot color classification by an open_clip model.

    GenEval uses OpenAI's ``ViT-L-14``, which was trained with QuickGELU. Current versions of open_clip build a model of that name
    with GELU and only warn, which changes the colors. Therefore the activation is checked here.

    Args:
        name: Name of an architecture in open_clip.
        weights: Tag of its weights in open_clip, or a file (also below ``UAE_CHECKPOINTS``).
        device: Device of the model.

    Raises:
        FileNotFoundError: open_clip cannot load the model.
        ValueError: The model's activation is not QuickGELU.
    """

    def __init__(self, name: str = MODEL, weights: str = WEIGHTS, device: str | torch.device = "cpu") -> None:
        import open_clip

        file = here(weights)
        self.device = torch.device(device)
        if "quickgelu" not in name:
            raise ValueError(f"--color_model {name!r} is built with GELU, OpenAI's weights need QuickGELU; set --color_model {MODEL}")
        try:
            model, _, self.transform = open_clip.create_model_and_transforms(
                name, pretrained=weights if file is None else os.fspath(file), weights_only=True
            )
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise FileNotFoundError(
                f"open_clip cannot load --color_model {name!r} with --color_weights {weights!r} ({reason}); set --color_weights"
            ) from error
        check_activation(model)
        self.model: Any = model.eval().requires_grad_(False).to(self.device)
        self.tokenizer = open_clip.get_tokenizer(name)
        self.backend = {"color_model": name, "color_weights": weights, "color_sha256": weights_digest(self.model)}
        self._classifiers: dict[str, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, image: Image.Image, boxes: Sequence[Sequence[float]], masks: Sequence[np.ndarray], name: str) -> list[str]:
        """The colors of the objects of one class.

        Args:
            image: RGB.
            boxes: Left, top, right and bottom of each object, in pixels.
            masks: Mask of each object, bool ``[H, W]``.
            name: Name of the class.
        """
        if not len(boxes):
            return []
        crops = torch.stack([self.transform(cut_out(image, box, mask)) for box, mask in zip(boxes, masks, strict=True)])
        with torch.autocast(self.device.type, enabled=False):
            features_ND = F.normalize(self.model.encode_image(crops.to(self.device)), dim=-1)
            return [COLORS[place] for place in (features_ND @ self._classifier(name)).argmax(1).tolist()]

    def _classifier(self, name: str) -> Tensor:
        """Classifier weights ``[D, 10]``: for each color the normalised mean of the templates' embeddings."""
        if name not in self._classifiers:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            embeds = F.normalize(self.model.encode_text(self.tokenizer(texts).to(self.device)), dim=-1)
            means = embeds.view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self._classifiers[name] = F.normalize(means, dim=-1).T
        return self._classifiers[name]


def cut_out(image: Image.Image, box: Sequence[float], mask: np.ndarray) -> Image.Image:
    """An object on flat gray, cropped to its box."""
    left, top, right, bottom = box[:4]
    blank = Image.new("RGB", image.size, color=GRAY)
    return Image.composite(image, blank, Image.fromarray(mask)).crop((left, top, right, bottom))


def check_activation(model: nn.Module) -> None:
    """Raise unless both towers of a CLIP model compute with QuickGELU.

    Raises:
        ValueError: A tower computes with another activation.
    """
    from open_clip.transformer import QuickGELU

    kinds = {type(part) for part in model.modules()}
    if QuickGELU not in kinds or nn.GELU in kinds:
        raise ValueError(f"the color model computes with GELU, OpenAI's weights need QuickGELU; set --color_model {MODEL}")
