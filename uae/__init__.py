"""Unified-GRPO: unified multimodal models trained as auto-encoders (arXiv 2509.09666)."""

__version__ = "0.2.0"
