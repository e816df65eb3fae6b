"""Procedural scenes with exact ground truth: the world, its pictures and its language."""

from uae.miniature.scenes.captions import DETAILED, GRAMMAR, TERSE, WORDS, Detail, describe, is_detailed, parse
from uae.miniature.scenes.world import SIDE, Object, Scene, Split, detect, render, sample_scene, scene_of, word_of

__all__ = [
    "DETAILED", "GRAMMAR", "SIDE", "TERSE", "WORDS", "Detail", "Object", "Scene", "Split",
    "describe", "detect", "is_detailed", "parse", "render", "sample_scene", "scene_of", "word_of",
]  # fmt: skip
