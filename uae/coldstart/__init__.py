"""Supervised training before reinforcement learning ("cold start"): one LightningModule, and one file per objective."""

from uae.coldstart.caption_tuning import CaptionTuning
from uae.coldstart.decoder_tuning import DecoderTuning
from uae.coldstart.module import ColdStart
from uae.coldstart.objective import Objective
from uae.coldstart.semantic_reconstruction import SemanticReconstruction
from uae.coldstart.started import Started

__all__ = ["CaptionTuning", "ColdStart", "DecoderTuning", "Objective", "SemanticReconstruction", "Started"]
