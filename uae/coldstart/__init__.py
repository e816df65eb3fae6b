"""Supervised cold start: one LightningModule, one file per objective it can minimise."""

from uae.coldstart.attributes import AttributeObjective
from uae.coldstart.autoencoding import AutoencoderObjective
from uae.coldstart.caption_tuning import CaptionTuning
from uae.coldstart.captioning import CaptionObjective, CaptionStyle
from uae.coldstart.contrastive import ContrastiveObjective
from uae.coldstart.decoder_tuning import DecoderTuning
from uae.coldstart.flow_matching import FlowMatchingObjective
from uae.coldstart.janus import JanusObjective
from uae.coldstart.module import ColdStart
from uae.coldstart.objective import Objective
from uae.coldstart.semantic_reconstruction import SemanticReconstruction
from uae.coldstart.started import Started
from uae.coldstart.vector_quantizing import VectorQuantizingObjective

__all__ = [
    "CaptionTuning", "DecoderTuning", "SemanticReconstruction", "Started",
    "AttributeObjective", "AutoencoderObjective", "CaptionObjective", "CaptionStyle", "ColdStart", "ContrastiveObjective",
    "FlowMatchingObjective", "JanusObjective", "Objective", "VectorQuantizingObjective",
]  # fmt: skip
