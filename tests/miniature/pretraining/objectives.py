"""Small objectives, and their loss with chance held fixed."""

import random

import torch

from uae.miniature.pretraining import (
    AttributeObjective,
    AutoencoderObjective,
    CaptionObjective,
    CaptionStyle,
    ContrastiveObjective,
    FlowMatchingObjective,
)
from uae.miniature.scenes import Detail

SMALL = {
    "attributes": lambda: AttributeObjective(width=32, layers=1),
    "autoencoding": lambda: AutoencoderObjective(width=24),
    "captioning": lambda: CaptionObjective([CaptionStyle(1.0, Detail(size=False)), CaptionStyle(3.0)]),
    "contrastive": lambda: ContrastiveObjective(edits=1),
    "flow_matching": lambda: FlowMatchingObjective(width=32, layers=1),
}


def built(name):
    torch.manual_seed(0)
    objective = SMALL[name]()
    objective.build()
    return objective


def loss(objective, batch):
    """With the same noise and the same captions at every call."""
    torch.manual_seed(5)
    objective.rng = random.Random(5)
    return objective(batch, 1.0)["loss"]
