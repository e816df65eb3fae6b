"""Rewards: numbers that say how good a reconstruction and its caption are."""

from uae.rewards.base import BaseReward
from uae.rewards.caption import CaptionFormat
from uae.rewards.control import CaptionLength, RandomReward
from uae.rewards.judge import VLMJudge
from uae.rewards.penalties import CopiedInstruction, ForeignScript, LengthBand, Repetition
from uae.rewards.perceptual import PerceptualSimilarity
from uae.rewards.preference import PreferenceScore
from uae.rewards.regions import RegionSimilarity
from uae.rewards.similarity import EncoderSimilarity
from uae.rewards.text import TextFidelity
from uae.rewards.weighted import WeightedReward

__all__ = [
    "BaseReward", "CaptionFormat", "CaptionLength", "CopiedInstruction", "EncoderSimilarity", "ForeignScript", "LengthBand",
    "PerceptualSimilarity", "PreferenceScore", "RandomReward", "RegionSimilarity", "Repetition", "TextFidelity", "VLMJudge",
    "WeightedReward",
]  # fmt: skip
