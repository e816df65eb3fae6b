"""Supervised cold start: one LightningModule, one file per objective it can minimise."""

from uae.coldstart.attributes import AttributeObjective
from uae.coldstart.autoencoding import AutoencoderObjective
from uae.coldstart.captioning import CaptionObjective, CaptionStyle
from uae.coldstart.contrastive import ContrastiveObjective
from uae.coldstart.flow_matching import FlowMatchingObjective
from uae.coldstart.module import ColdStart
from uae.coldstart.objective import Objective

__all__ = [
    "AttributeObjective", "AutoencoderObjective", "CaptionObjective", "CaptionStyle", "ColdStart", "ContrastiveObjective",
    "FlowMatchingObjective", "Objective",
]  # fmt: skip
