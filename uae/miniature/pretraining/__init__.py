"""Cold-start objectives of the miniature's parts, one file each; `uae.coldstart.ColdStart` minimises them."""

from uae.miniature.pretraining.attributes import AttributeObjective
from uae.miniature.pretraining.autoencoding import AutoencoderObjective
from uae.miniature.pretraining.captioning import CaptionObjective, CaptionStyle
from uae.miniature.pretraining.contrastive import ContrastiveObjective
from uae.miniature.pretraining.flow_matching import FlowMatchingObjective
from uae.miniature.pretraining.janus import JanusObjective
from uae.miniature.pretraining.vector_quantizing import VectorQuantizingObjective

__all__ = [
    "AttributeObjective", "AutoencoderObjective", "CaptionObjective", "CaptionStyle", "ContrastiveObjective",
    "FlowMatchingObjective", "JanusObjective", "VectorQuantizingObjective",
]  # fmt: skip
