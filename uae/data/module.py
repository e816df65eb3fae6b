"""Where images come from. Both modules yield `uae.types.ImageBatch` and can be swapped by configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning as L
import torch

from uae.data.captions import METADATA, CaptionFiles
from uae.data.folder import Fit, FolderSource, list_images, split_of
from uae.data.sampler import EvalBatches, ImageLoader, ImageSource, TrainBatches
from uae.data.scenes import SceneSource
from uae.types import ImageBatch


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
        self.skipped: dict[str, str] = {}  # unreadable files of this process, name to reason

    def source(self, stage: Literal["train", "val", "test", "predict"]) -> ImageSource | None:
        """The images of a stage, or None if there are none by configuration."""
        raise NotImplementedError

    def check_captions(self) -> None:
        """For whoever learns from captions: raise unless every training and validation image has one.

        Raises:
            ValueError: Some have none; with their number and examples.
        """

    def train_dataloader(self) -> ImageLoader:
        """Ranks take disjoint images; each batch comes ``batches_per_rollout`` times, an attribute of the module."""
        source = self.source("train")
        if source is None:
            raise ValueError(f"{type(self).__name__} has no training images")
        rank, world_size = self._rank()
        shuffle = not (self.trainer and self.trainer.overfit_batches)
        batches = TrainBatches(len(source), self.batch_size, rank, world_size, self.seed, shuffle)
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
        return {**batch, "image": batch["image"].to(device), "id": batch["id"].to(device)}

    def _evaluation(self, stage: Literal["val", "test", "predict"]) -> ImageLoader | list[ImageLoader]:
        source = self.source(stage)
        if source is None:
            return []
        batches = EvalBatches(len(source), self.eval_batch_size, *self._rank())
        return ImageLoader(source, batches, num_workers=self.num_workers, skipped=self.skipped)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


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
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, num_workers)
        self.train_size, self.val_size, self.test_size, self.counts = train_size, val_size, test_size, counts

    def source(self, stage: Literal["train", "val", "test", "predict"]) -> ImageSource | None:
        """Scenes of the stage's split."""
        split: Literal["train", "val", "test"] = "test" if stage == "predict" else stage
        size = {"train": self.train_size, "val": self.val_size, "test": self.test_size}[split]
        return SceneSource(split, size, self.seed, tuple(self.counts)) if size else None


class ImageFolderData(ImageData):
    """A folder of images, searched recursively, of any size and mode. Unreadable files are skipped and named.

    Files are split by the hash of their relative name, or come from folders of their own. Captions, which only supervised
    training needs, lie beside the images: see `uae.data.captions`.

    Args:
        root: Folder of the training images, and of the others unless they have their own.
        image_size: Side of the square images that come out, in pixels.
        fit: How an image becomes square: "crop" its centre, "pad" with white, or "squash".
        batch_size: Images per training batch and process.
        eval_batch_size: Images per evaluation batch and process, at most.
        val_share: Share of ``root`` kept for validation, in [0, 1]; 0 means no validation. Unused with ``val_root``.
        test_share: Share of ``root`` kept for testing, in [0, 1]. Unused with ``test_root``.
        val_root: Folder of the validation images.
        test_root: Folder of the test images.
        predict_root: Folder of the images to predict; the default is the test images.
        num_workers: Processes that read ahead.
        max_pixels: Larger images are skipped, not decompressed; above 178 956 970 Pillow refuses in any case.
        seed: Seed of the training order.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 512,
        fit: Literal["crop", "pad", "squash"] = "crop",
        batch_size: int = 8,
        eval_batch_size: int = 16,
        val_share: float = 0.02,
        test_share: float = 0.02,
        val_root: str | None = None,
        test_root: str | None = None,
        predict_root: str | None = None,
        num_workers: int = 4,
        max_pixels: int = 89_478_485,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, num_workers)
        self.root, self.image_size, self.max_pixels = root, image_size, max_pixels
        self.fit: Fit = fit
        self.val_share, self.test_share = val_share, test_share
        self.roots = {"val": val_root, "test": test_root, "predict": predict_root}

    def source(self, stage: Literal["train", "val", "test", "predict"]) -> ImageSource | None:
        """Files of the stage's own folder, or of its share of ``root``."""
        own = self.roots.get(stage)
        if own:
            names = list_images(own, f"data.{stage}_root")
            captions = CaptionFiles(own, f"data.{stage}_root")
            return FolderSource(
                own, names, self.image_size, self.fit, self.max_pixels, role=f"{stage}:", captions=captions
            )
        if stage == "predict":
            return self.source("test")
        val_share = 0.0 if self.roots["val"] else self.val_share
        test_share = 0.0 if self.roots["test"] else self.test_share
        if {"val": val_share, "test": test_share}.get(stage) == 0.0:
            return None
        everything = list_images(self.root, "data.root")
        names = [name for name in everything if split_of(name, val_share, test_share) == stage]
        if not names:
            raise ValueError(
                f"none of the {len(everything)} images in data.root={self.root!r} fell into the {stage} split "
                f"(data.val_share={val_share}, data.test_share={test_share}): change the shares"
                + (f" or set data.{stage}_root" if stage != "train" else "")
            )
        return FolderSource(
            self.root,
            names,
            self.image_size,
            self.fit,
            self.max_pixels,
            replace=stage == "train",
            captions=CaptionFiles(self.root),
        )

    def check_captions(self) -> None:
        """Raise unless every training and validation image has a caption; one look-up per image."""
        stages: tuple[Literal["train", "val"], ...] = ("train", "val")
        for stage in stages:
            source = self.source(stage)
            missing = source.without_caption() if isinstance(source, FolderSource) else []
            if missing:
                key = f"{stage}_root" if self.roots.get(stage) else "root"
                names = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
                raise ValueError(
                    f"{len(missing)} of {len(source)} {stage} images have no caption ({names}): put <name>.txt beside each or "  # type: ignore[arg-type]
                    f"list them in a {METADATA} (file_name, text), or change data.init_args.{key}"
                )
