"""The base class of all data modules. They all yield `uae.types.ImageBatch`, so one can take the place of another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Protocol, runtime_checkable

import lightning as L
import torch

from uae.data.sampler import EvalBatches, ImageLoader, ImageSource, TrainBatches
from uae.data.skipped import Skipped
from uae.trainer import overfit_batches
from uae.types import ImageBatch

Stage = Literal["train", "val", "test", "predict"]


@runtime_checkable
class RepeatsBatches(Protocol):
    """A LightningModule that needs every training batch several times in a row, as `uae.module.UnifiedGRPO` does.

    It collects experience from a batch once and updates on it in several steps.
    """

    @property
    def batches_per_rollout(self) -> int:
        """How many times in a row every training batch must come, 1 or more."""
        ...


@runtime_checkable
class ChecksCaptions(Protocol):
    """A data module that can tell whether its images have captions, as `ImageData` does."""

    def check_captions(self) -> None:
        """Raise ValueError if a training or validation image has no caption."""
        ...


class ImageData(L.LightningDataModule, ABC):
    """The loaders of all stages. A subclass defines `source`: the images of a stage.

    Args:
        batch_size: Images per training batch and process.
        eval_batch_size: Images per validation, test or prediction batch and process, at most.
        seed: Seed of the order of training images.
        num_workers: The number of processes that read ahead; 0 reads in the training process.

    Raises:
        ValueError: A number is out of its range.
    """

    def __init__(self, batch_size: int, eval_batch_size: int, seed: int, num_workers: int) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("num_workers", num_workers, 0),
        ):
            if value < least:
                raise ValueError(f"data.init_args.{name}={value}; allowed: {least} or more")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.seed, self.num_workers = seed, num_workers
        self.skipped = Skipped()  # unreadable images of this process, name to reason
        self._logged = 0

    @abstractmethod
    def source(self, stage: Stage) -> ImageSource | None:
        """The images of a stage, or None if it has none."""

    def setup(self, stage: str) -> None:
        """Name unreadable images in ``skipped.rank<rank>.jsonl`` in the log directory, if the run has one."""
        if self.trainer is None:
            return
        folder = self.trainer.log_dir  # every process has to ask for it
        if folder:
            self.skipped.write_to(folder, self.trainer.global_rank)

    def teardown(self, stage: str) -> None:
        """Print how many images were unreadable, on every process that met some."""
        if self.skipped:
            print(f"rank {self._rank()[0]}: {len(self.skipped)} unreadable images skipped, see {self.skipped.file}")

    def check_captions(self) -> None:
        """Check that every training and validation image has a caption, for supervised training.

        Raises:
            ValueError: Some have none. The message has their number and a few names.
        """

    @property
    def shuffles(self) -> bool:
        """Whether every training epoch has its own order; not if ``trainer.overfit_batches`` repeats the same batches."""
        return not (self.trainer and overfit_batches(self.trainer))

    def train_batches(self, source: ImageSource, rank: int, world_size: int) -> TrainBatches:
        """The positions of every training batch of one process."""
        return TrainBatches(len(source), self.batch_size, rank, world_size, self.seed, self.shuffles)

    def train_dataloader(self) -> ImageLoader:
        """Training images. Processes take different ones, and a module that `RepeatsBatches` gets each batch repeatedly."""
        source = self.source("train")
        if source is None:
            raise ValueError(f"{type(self).__name__} has no training images: set data.class_path to a data module that has")
        module = self.trainer.lightning_module if self.trainer else None
        repeats = module.batches_per_rollout if isinstance(module, RepeatsBatches) else 1
        return ImageLoader(source, self.train_batches(source, *self._rank()), repeats, self.num_workers, self.skipped)

    def val_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Validation images, dealt out to the processes; no loader if there are none."""
        return self._evaluation("val")

    def test_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """Test images, dealt out to the processes; no loader if there are none."""
        return self._evaluation("test")

    def predict_dataloader(self) -> ImageLoader | list[ImageLoader]:
        """The images to caption and reconstruct, dealt out to the processes; no loader if there are none."""
        return self._evaluation("predict")

    def transfer_batch_to_device(self, batch: ImageBatch, device: torch.device, dataloader_idx: int) -> ImageBatch:
        """Move the tensors of a batch to a device, and log the number of unreadable images if it has grown.

        Lightning's own way would search ``scene`` for tensors, and refuse the frozen dataclasses in it.
        """
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
        """The number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
