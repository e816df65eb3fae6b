"""Objects with masks by transformers' Mask2Former, post-processed as GenEval's own detector (mmdet) does it.

The two detectors do not agree exactly, since their weights are of different training runs and their scores are calibrated
differently; therefore results of this detector carry its name. transformers' own post-processing is not used: it works at
384 x 384 pixels, keeps the padding, and lets objects overwrite each other.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from uae.bench.fingerprints import weights_digest
from uae.bench.geneval.prompts import CLASSES
from uae.bench.geneval.rules import THRESHOLD
from uae.files.locations import locate

SHORT, LONG, DIVISOR = 800, 1333, 32  # largest sides of a resized image in pixels; it is padded to a multiple of the divisor
MOST = 100  # detections per image
CHUNK = 25  # masks that are resized to full size at once; a mask of a megapixel takes 4 MB
DETECTOR = "facebook/mask2former-swin-small-coco-instance"


@dataclass(frozen=True)
class Instances:
    """M detected objects of one image.

    Args:
        labels_M: Position of each object's category in `CLASSES`.
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
        device: Device of the model.

    Raises:
        FileNotFoundError: The checkpoint cannot be loaded.
        ValueError: The checkpoint has other categories than COCO's 80.
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
        digest = weights_digest(model)
        self.backend = {"detector": path, "detector_sha256": digest, "post_processing": "mmdet's", "size": [SHORT, LONG, DIVISOR]}

    @torch.inference_mode()
    def __call__(self, image: Image.Image) -> Instances:
        """Detect the objects in an RGB image of any size whose score is above GenEval's lower threshold."""
        pixels, resized = self._pixels(image)
        with torch.autocast(self.device.type, enabled=False):
            out = self.model(pixel_values=pixels)
        padded = (int(pixels.shape[2]), int(pixels.shape[3]))
        return instances(
            out.class_queries_logits[0], out.masks_queries_logits[0], padded, resized, (image.height, image.width), THRESHOLD
        )

    def _pixels(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """The normalised and padded image ``[1, 3, H, W]``, and its height and width without the padding."""
        levels = torch.from_numpy(np.array(image)).to(self.device).permute(2, 0, 1).float()[None] / 255
        height, width = size = scaled(image.height, image.width)
        if size != (image.height, image.width):
            levels = F.interpolate(levels, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (levels.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return F.pad((levels - mean) / std, (0, -width % DIVISOR, 0, -height % DIVISOR)), size


def scaled(height: int, width: int) -> tuple[int, int]:
    """Height and width of the resized image: as large as `SHORT` and `LONG` allow, with the image's proportions."""
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
    """Post-process as mmdet does for Mask2Former: take the best (query, class) pairs, with masks at the image's size.

    The score of a pair is its class probability times the mean probability inside its mask.

    Args:
        classes_QK: Class logits of Q queries; the last class is "no object".
        masks_Qhw: Mask logits of the queries, at the network's resolution.
        padded: Height and width of the network's input.
        resized: Height and width of the input without the padding.
        original: Height and width of the image.
        least: Objects must score above this threshold, compared as float32.
        most: Number of best pairs that are considered.
    """
    probability_QK = classes_QK.float().softmax(-1)[:, :-1]
    kinds = probability_QK.shape[1]
    best_P, place_P = probability_QK.flatten().topk(min(most, probability_QK.numel()))
    query_P, label_P = place_P // kinds, place_P % kinds
    found: list[tuple[Tensor, ...]] = []
    for queries in query_P.unique().split(CHUNK):  # the mask of a query is resized once for all its classes
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
    """Bounding box (left, top, right, bottom) of a mask that is not empty; right and bottom are exclusive."""
    rows, columns = mask_HW.any(1).nonzero(), mask_HW.any(0).nonzero()
    return torch.stack([columns[0, 0], rows[0, 0], columns[-1, 0] + 1, rows[-1, 0] + 1]).float()


def _full_size(masks_Chw: Tensor, padded: tuple[int, int], resized: tuple[int, int], original: tuple[int, int]) -> Tensor:
    inputs = F.interpolate(masks_Chw[None].float(), padded, mode="bilinear", align_corners=False)
    cropped = inputs[..., : resized[0], : resized[1]]
    return F.interpolate(cropped, original, mode="bilinear", align_corners=False)[0]
