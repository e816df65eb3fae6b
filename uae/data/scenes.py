"""Procedural scenes as a source of images."""

from __future__ import annotations

import torch

from uae.scenes import Split, describe, render, scene_of
from uae.types import ImageBatch

SPLITS: tuple[Split, ...] = ("train", "val", "test")
IDS_PER_SPLIT = 2**40  # so that ids of different splits never meet; metrics want ids below 2**48


class SceneSource:
    """``size`` scenes of a split, rendered a batch at a time. Their content decides the split, so splits share none."""

    def __init__(self, split: Split, size: int, seed: int, counts: tuple[int, ...]) -> None:
        self.split, self.size, self.seed, self.counts = split, size, seed, counts

    def __len__(self) -> int:
        """Number of scenes."""
        return self.size

    def __getitems__(self, positions: list[int]) -> tuple[ImageBatch, dict[str, str]]:
        """Images ``[B, 3, 24, 24]`` in [0, 1] with their ground truth and a detailed caption; nothing is left out."""
        scenes = [scene_of(position, self.split, self.seed, self.counts) for position in positions]
        ids = torch.tensor(positions) + SPLITS.index(self.split) * IDS_PER_SPLIT
        names = [f"scene-{number}" for number in ids.tolist()]
        captions = [describe(scene) for scene in scenes]
        return {"image": render(scenes), "id": ids, "name": names, "scene": scenes, "caption": captions}, {}
