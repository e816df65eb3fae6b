"""What a cold start minimises: one file per objective, all trained by `uae.coldstart.ColdStart`."""

from uae.objectives.attributes import AttributeObjective
from uae.objectives.autoencoding import AutoencoderObjective
from uae.objectives.captioning import CaptionObjective, CaptionStyle
from uae.objectives.contrastive import ContrastiveObjective
from uae.objectives.flow_matching import FlowMatchingObjective
from uae.objectives.objective import Objective

__all__ = [
    "AttributeObjective", "AutoencoderObjective", "CaptionObjective", "CaptionStyle", "ContrastiveObjective",
    "FlowMatchingObjective", "Objective",
]  # fmt: skip
