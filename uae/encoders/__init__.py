"""Frozen image encoders: what rewards and metrics look through. Each one owns its preprocessing."""

from uae.encoders.huggingface import HFEncoder
from uae.encoders.layout import LayoutEncoder
from uae.encoders.openclip import OpenCLIPEncoder
from uae.encoders.similarity import similarity

__all__ = ["HFEncoder", "LayoutEncoder", "OpenCLIPEncoder", "similarity"]
