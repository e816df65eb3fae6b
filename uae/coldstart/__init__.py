"""Supervised cold start: one LightningModule, one file per objective it can minimise."""

from uae.coldstart.caption_tuning import CaptionTuning
from uae.coldstart.decoder_tuning import DecoderTuning
from uae.coldstart.module import ColdStart
from uae.coldstart.objective import Objective
from uae.coldstart.semantic_reconstruction import SemanticReconstruction
from uae.coldstart.started import Started

__all__ = ["CaptionTuning", "ColdStart", "DecoderTuning", "Objective", "SemanticReconstruction", "Started"]
