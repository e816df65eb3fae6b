"""What all data modules share. All yield `uae.types.ImageBatch` and can be swapped."""

from __future__ import annotations

from typing import Literal

import lightning as L
import torch

from uae.data.sampler import EvalBatches, ImageLoader, ImageSource, TrainBatches
from uae.data.skipped import Skipped
from uae.types import ImageBatch

Stage = Literal["train", "val", "test", "predict"]


class ImageData(L.LightningDataModule):
    """Loaders around four sources of images, the same for every data set.

    Args:
        batch_size: Images per training batch and process.
        eval_batch_size: Images per validation, test or prediction batch and process, at most.
        seed: Seed of the training order.
        num_workers: Processes that read ahead; 0 reads in the training process.
    """

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.skipped = Skipped()  # unreadable images of this process, name to reason
        self._logged = 0

    def source(self, stage: Stage) -> ImageSource | None:
        """The images of a stage, or None if there are none by configuration."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Unreadable images are named in a file of the log directory, ``skipped.rank<rank>.jsonl``."""
        folder = self.trainer.log_dir if self.trainer else None  # asking for it is collective
        if folder:
            self.skipped.write_to(folder, self.trainer.global_rank)

    def teardown(self, stage: str) -> None:
        """Say how many images were unreadable, on every rank that met some."""
        if self.skipped:
            print(f"rank {self._rank()[0]}: {len(self.skipped)} unreadable images skipped, see {self.skipped.file}")

    def check_captions(self) -> None:
        """For whoever learns from captions: raise unless every training and validation image has one.

        Raises:
            ValueError: Some have none; with their number and examples.
        """

    def train_batches(self, source: ImageSource, rank: int, world_size: int, shuffle: bool) -> TrainBatches:
        """Which images are in which training batch."""
        return TrainBatches(len(source), self.batch_size, rank, world_size, self.seed, shuffle)

    def train_dataloader(self) -> ImageLoader:
        """Ranks take disjoint images; each batch comes ``batches_per_rollout`` times, an attribute of the module."""
        source = self.source("train")
        if source is None:
            raise ValueError(f"{type(self).__name__} has no training images")
        rank, world_size = self._rank()
        shuffle = not (self.trainer and self.trainer.overfit_batches)
        batches = self.train_batches(source, rank, world_size, shuffle)
        module = self.trainer.lightning_module if self.trainer else None
        repeats = getattr(module, "batches_per_rollout", 1)
        return ImageLoader(source, batches, repeats, self.num_workers, self.skipped)

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Validation images, dealt out to the ranks."""
        return self._evaluation("val")

    def test_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Test images, dealt out to the ranks."""
        return self._evaluation("test")

    def predict_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Images to caption and reconstruct."""
        return self._evaluation("predict")

    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        """Moves the tensors; Lightning's own traversal would refuse the frozen dataclasses of ``scene``."""
        if self.trainer and self.trainer.logger and len(self.skipped) > self._logged:
            self._logged = len(self.skipped)
            self.trainer.logger.log_metrics({"data/skipped": self._logged}, step=self.trainer.global_step)
        return {**batch, "image": batch["image"].to(device), "id": batch["id"].to(device)}

    def _evaluation(self, stage: Literal["val", "test", "predict"]) -> ImageLoader | list[ImageLoader]:
        source = self.source(stage)
        if source is None:
            return []
        batches = EvalBatches(len(source), self.eval_batch_size, *self._rank())
        return ImageLoader(source, batches, num_workers=self.num_workers, skipped=self.skipped)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
