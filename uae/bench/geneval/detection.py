"""Objects with masks by transformers' Mask2Former, post-processed as GenEval's own detector (mmdet) does it.

Neither library's result is the other's: the weights are of another training run, and their scores are calibrated
otherwise. So results of this detector carry its name. transformers' own post-processing is not used: it works at
384 x 384, keeps the padding, and lets objects overwrite each other.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from uae.bench.geneval.prompts import CLASSES
from uae.bench.geneval.rules import THRESHOLD
from uae.files.locations import locate

SHORT, LONG, DIVISOR = 800, 1333, 32  # the detector sees images resized to at most this, padded to a multiple
MOST = 100  # detections per image
CHUNK = 25  # masks at full size at once: a mask of a megapixel takes 4 MB
DETECTOR = "facebook/mask2former-swin-small-coco-instance"


@dataclass(frozen=True)
class Instances:
    """M objects of one image.

    Args:
        labels_M: Places in COCO's categories.
        scores_M: Class probability times the mean probability inside the mask, in [0, 1].
        boxes_M4: left, top, right, bottom: the extent of the mask, in pixels; right and bottom are exclusive.
        masks_MHW: bool, in the image's own size.
    """

    labels_M: Tensor
    scores_M: Tensor
    boxes_M4: Tensor
    masks_MHW: Tensor


class Mask2Former:
    """A detector of COCO's 80 categories.

    Args:
        path: A folder, a folder below ``UAE_CHECKPOINTS`` or a model id on the hub.
        device: Where it works.

    Raises:
        ValueError: The checkpoint knows other categories.
    """

    def __init__(self, path: str = DETECTOR, device: str | torch.device = "cpu") -> None:
        from transformers import AutoImageProcessor, Mask2FormerForUniversalSegmentation

        place = locate(path)
        local = os.path.isdir(place)
        self.device = torch.device(device)
        try:
            processor = AutoImageProcessor.from_pretrained(place, local_files_only=local, trust_remote_code=False)
            model = Mask2FormerForUniversalSegmentation.from_pretrained(place, dtype=torch.float32, local_files_only=local)
        except (OSError, ImportError) as error:  # its loss, which nothing here computes, needs scipy
            reason = str(error).strip().splitlines()[0]
            raise FileNotFoundError(f"cannot load detector {path!r}, here or from the hub ({reason}); set --detector") from error
        if model.config.num_labels != len(CLASSES):
            raise ValueError(
                f"detector {path!r} knows {model.config.num_labels} categories, GenEval needs COCO's {len(CLASSES)} "
                f"(an instance checkpoint, as {DETECTOR}); set --detector"
            )
        self.model = model.eval().requires_grad_(False).to(self.device)
        self.mean, self.std = processor.image_mean, processor.image_std
        self.backend = {"detector": path, "post_processing": "mmdet's", "size": [SHORT, LONG, DIVISOR]}

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Instances:
        """Objects above GenEval's lower threshold in an RGB image of any size."""
        pixels, resized = self._pixels(image)
        with torch.autocast(self.device.type, enabled=False):
            out = self.model(pixel_values=pixels)
        padded = (int(pixels.shape[2]), int(pixels.shape[3]))
        return instances(
            out.class_queries_logits[0], out.masks_queries_logits[0], padded, resized, (image.height, image.width), THRESHOLD
        )

    def _pixels(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """Normalised and padded ``[1, 3, H, W]``, and the size without the padding."""
        levels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1).float()[None] / 255
        height, width = size = scaled(image.height, image.width)
        if size != (image.height, image.width):
            levels = F.interpolate(levels, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (levels.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return F.pad((levels - mean) / std, (0, -width % DIVISOR, 0, -height % DIVISOR)), size


def scaled(height: int, width: int) -> tuple[int, int]:
    """The size that fits into `SHORT` and `LONG`, with the image's proportions."""
    factor = min(LONG / max(height, width), SHORT / min(height, width))
    return max(1, math.floor(height * factor + 0.5)), max(1, math.floor(width * factor + 0.5))


def instances(
    classes_QK: Tensor,
    masks_Qhw: Tensor,
    padded: tuple[int, int],
    resized: tuple[int, int],
    original: tuple[int, int],
    least: float,
    most: int = MOST,
) -> Instances:
    """The rule of mmdet for Mask2Former: the best (query, class) pairs, their masks at full size, scored by both.

    Args:
        classes_QK: Logits of Q queries, the last class is "no object".
        masks_Qhw: Logits of their masks, at the network's resolution.
        padded: Height and width of the network's input.
        resized: The same without the padding.
        original: Of the image.
        least: Objects must score above this, compared as float32.
        most: Pairs that are looked at.
    """
    probability_QK = classes_QK.float().softmax(-1)[:, :-1]
    kinds = probability_QK.shape[1]
    best_P, place_P = probability_QK.flatten().topk(min(most, probability_QK.numel()))
    query_P, label_P = place_P // kinds, place_P % kinds
    found: list[tuple[Tensor, ...]] = []
    for queries in query_P.unique().split(CHUNK):  # a query's mask is resized once, however many classes it is paired with
        logits_CHW = _full_size(masks_Qhw[queries], padded, resized, original)
        mask_CHW = logits_CHW > 0
        area_C = mask_CHW.flatten(1).sum(1)
        inside_C = (logits_CHW.sigmoid() * mask_CHW).flatten(1).sum(1) / (area_C + 1e-6)
        for pair in torch.isin(query_P, queries).nonzero().flatten():
            at = int((queries == query_P[pair]).nonzero())
            score = best_P[pair] * inside_C[at]
            if score > least:
                found.append((pair, label_P[pair], score, extent(mask_CHW[at]), mask_CHW[at]))
    found.sort(key=lambda one: int(one[0]))
    if not found:
        none = best_P.new_zeros(0)
        return Instances(none.long(), none, none.view(0, 4), none.bool().view(0, 1, 1).expand(0, *original))
    _, labels, scores, boxes, masks = zip(*found, strict=True)
    return Instances(torch.stack(labels), torch.stack(scores), torch.stack(boxes), torch.stack(masks))


def extent(mask_HW: Tensor) -> Tensor:
    """left, top, right, bottom of what is True in a mask that is not empty; right and bottom are exclusive."""
    rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()


def _full_size(masks_Chw: Tensor, padded: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    inputs = F.interpolate(masks_Chw[None].float(), padded, mode="bilinear", align_corners=False)
    cropped = inputs[..., : resized[0], : resized[1]]
    result: Any = F.interpolate(cropped, original, mode="bilinear", align_corners=False)
    return result[0]
