"""Frozen image encoders, which rewards and metrics compare images by. Each one does its own preprocessing."""

from uae.encoders.huggingface import HFEncoder
from uae.encoders.layout import LayoutEncoder
from uae.encoders.openclip import OpenCLIPEncoder
from uae.encoders.similarity import similarity

__all__ = ["HFEncoder", "LayoutEncoder", "OpenCLIPEncoder", "similarity"]
