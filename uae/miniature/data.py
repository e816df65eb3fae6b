"""Procedural scenes as images for training and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from uae.data.module import ImageData, Stage
from uae.data.sampler import ImageSource
from uae.miniature.scenes import Split, describe, render, scene_of
from uae.miniature.scenes.world import GRID
from uae.types import ImageBatch

SPLITS: tuple[Split, ...] = ("train", "val", "test")
IDS_PER_SPLIT = 2**40  # so that ids of different splits never meet; metrics want ids below 2**48


class SceneSource:
    """``size`` scenes of a split, rendered a batch at a time. Their content decides the split, so splits share none."""

    def __init__(self, split: Split, size: int, seed: int, counts: tuple[int, ...], words: bool = False) -> None:
        self.split, self.size, self.seed, self.counts, self.words = split, size, seed, counts, words

    def __len__(self) -> int:
        """Number of scenes."""
        return self.size

    def __getitems__(self, positions: list[int]) -> tuple[ImageBatch, dict[str, str]]:
        """Images ``[B, 3, 24, 24]`` in [0, 1] with their ground truth and a detailed caption; nothing is left out."""
        scenes = [scene_of(position, self.split, self.seed, self.counts, self.words) for position in positions]
        ids = torch.tensor(positions) + SPLITS.index(self.split) * IDS_PER_SPLIT
        names = [f"{self.split}-{position}" for position in positions]
        captions = [describe(scene) for scene in scenes]
        return {"image": render(scenes), "id": ids, "name": names, "scene": scenes, "caption": captions}, {}


class SceneData(ImageData):
    """Procedural scenes, 24 x 24 pixels, with exact ground truth (``scene`` in the batch).

    Splits share no scene. Prediction uses the test split.

    Args:
        batch_size: Images per training batch and process.
        train_size: Scenes in the training split; one epoch sees each once.
        val_size: Scenes in the validation split.
        test_size: Scenes in the test split.
        eval_batch_size: Images per evaluation batch and process, at most.
        counts: How many objects a scene may have, drawn uniformly.
        words: Whether every scene carries a word: three tiny objects of one color side by side, whose shapes are letters.
        seed: Seed of the scenes and of their order.
        num_workers: Processes that render ahead; rendering is cheaper than starting them.
    """

    def __init__(
        self,
        batch_size: int = 8,
        train_size: int = 100_000,
        val_size: int = 256,
        test_size: int = 512,
        eval_batch_size: int = 64,
        counts: Sequence[int] = (1, 2, 3),
        words: bool = False,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, num_workers)
        if not counts or not all(1 <= count <= GRID**2 for count in counts):
            raise ValueError(f"data.init_args.counts={list(counts)}; allowed: one or more numbers from 1 to {GRID**2}")
        self.train_size, self.val_size, self.test_size = train_size, val_size, test_size
        self.counts, self.words = tuple(counts), words

    def source(self, stage: Stage) -> ImageSource | None:
        """Scenes of the stage's split."""
        split: Literal["train", "val", "test"] = "test" if stage == "predict" else stage
        size = {"train": self.train_size, "val": self.val_size, "test": self.test_size}[split]
        return SceneSource(split, size, self.seed, self.counts, self.words) if size else None
