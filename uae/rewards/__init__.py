"""Rewards: numbers that say how good a reconstruction and its caption are."""

from uae.rewards.base import BaseReward
from uae.rewards.caption import CaptionFormat
from uae.rewards.control import CaptionLength, RandomReward
from uae.rewards.similarity import EncoderSimilarity
from uae.rewards.weighted import WeightedReward

__all__ = ["BaseReward", "CaptionFormat", "CaptionLength", "EncoderSimilarity", "RandomReward", "WeightedReward"]
