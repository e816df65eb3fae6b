"""The base class of all data modules. They all yield `uae.types.ImageBatch`, so one can take the place of another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal, Protocol, runtime_checkable

import lightning as L
import torch

from uae.data.captions import Captions
from uae.data.sampler import EvalBatches, ImageLoader, ImageSource, TrainBatches
from uae.data.skipped import Skipped
from uae.data.tally import Tally
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
class NeedsCaptions(Protocol):
    """A LightningModule or a metric that says whether it learns from, or compares with, captions of the data set.

    If it does, images without a caption are skipped. If it does not, no captions are read.
    """

    @property
    def needs_captions(self) -> bool:
        """Whether every batch must have captions."""
        ...


@runtime_checkable
class Counted(Protocol):
    """A source that counts what was found and skipped before anything is read."""

    tallies: list[Tally]


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
        self.captions: Captions = "welcome"  # `setup` asks the LightningModule
        self._logged = 0
        self._sources: dict[Stage, ImageSource | None] = {}  # of the run that `setup` was called for

    @abstractmethod
    def source(self, stage: Stage) -> ImageSource | None:
        """The images of a stage, or None if it has none."""

    def setup(self, stage: str) -> None:
        """Find the images of the run, and print in one line how many were found, used and skipped.

        Skipped and unreadable ones are named in ``skipped.rank<rank>.jsonl`` in the log directory, if the run has one.
        """
        if self.trainer is None:
            return
        self.captions = self._captions_for(stage)
        self._sources = {one: self.source(one) for one in self._stages(stage)}
        folder = self.trainer.log_dir  # every process has to ask for it
        if folder:
            self.skipped.write_to(folder, self.trainer.global_rank)
        if not self.trainer.is_global_zero:
            return
        lines = []
        for one, source in self._sources.items():
            if source is not None:
                tallies = source.tallies if isinstance(source, Counted) else []
                lines.append(f"{one}: " + "; ".join(map(str, tallies or [Tally(len(source))])))
                for tally in tallies:
                    self.skipped.write(tally.names)
        print(f"data of {' | '.join(lines) or 'this run: none'}")

    def _captions_for(self, stage: str) -> Captions:
        module = self.trainer.lightning_module if self.trainer else None
        if not isinstance(module, NeedsCaptions):
            return "welcome"
        return "needed" if module.needs_captions and stage != "predict" else "unread"

    def _stages(self, stage: str) -> list[Stage]:
        """The stages whose images a run of ``fit``, ``validate``, ``test`` or ``predict`` reads."""
        runs: dict[str, list[Stage]] = {"fit": ["train", "val"], "validate": ["val"], "test": ["test"], "predict": ["predict"]}
        unused = {"val"} if stage == "fit" and self.trainer and not self.trainer.limit_val_batches else set[str]()
        return [one for one in runs[stage] if one not in unused]

    def teardown(self, stage: str) -> None:
        """Print what was found and skipped while images were read, on every process that met something."""
        if line := self.skipped.report():
            print(f"rank {self._rank()[0]}: {line}")

    @property
    def shuffles(self) -> bool:
        """Whether every training epoch has its own order; not if ``trainer.overfit_batches`` repeats the same batches."""
        return not (self.trainer and overfit_batches(self.trainer))

    def train_batches(self, source: ImageSource, rank: int, world_size: int) -> TrainBatches:
        """The positions of every training batch of one process."""
        return TrainBatches(len(source), self.batch_size, rank, world_size, self.seed, self.shuffles)

    def train_dataloader(self) -> ImageLoader:
        """Training images. Processes take different ones, and a module that `RepeatsBatches` gets each batch repeatedly."""
        source = self._source("train")
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
        source = self._source(stage)
        if source is None:
            return []
        batches = EvalBatches(len(source), self.eval_batch_size, *self._rank())
        return ImageLoader(source, batches, num_workers=self.num_workers, skipped=self.skipped)

    def _source(self, stage: Stage) -> ImageSource | None:
        return self._sources[stage] if stage in self._sources else self.source(stage)

    def _rank(self) -> tuple[int, int]:
        """The number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
