"""Photographs as data modules: folders, tables and tar shards, with the same arguments."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from typing import Any, Literal

from uae.data.captions import METADATA, CaptionFiles
from uae.data.folder import FolderSource, list_images
from uae.data.huggingface import HuggingFaceShards, HuggingFaceTable, load
from uae.data.module import ImageData, Stage
from uae.data.sampler import ImageSource, TrainBatches
from uae.data.shards import TarShards, list_shards
from uae.data.source import split_of
from uae.data.streaming import SequentialSource, Shards, StreamBatches, StreamSource
from uae.data.tables import ParquetTable, Table, TableSource, list_tables
from uae.files.pictures import MAX_FILE_BYTES, MAX_PIXELS, Fit, Reading


class PhotographData(ImageData):
    """Images of any size, format and mode, found under a ``root`` and split by the hash of their names.

    Unreadable images are skipped, counted, and named in ``skipped.rank<rank>.jsonl`` in the log directory.

    Args:
        root: Where the training images are, and the others unless they have their own root.
        image_size: Side of the square images that come out, in pixels.
        fit: How an image becomes square: "crop" its centre, "pad" with white, or "squash".
        batch_size: Images per training batch and process.
        eval_batch_size: Images per evaluation batch and process, at most.
        val_share: Share of ``root`` kept for validation, in [0, 1]; 0 means no validation. Unused with ``val_root``.
        test_share: Share of ``root`` kept for testing, in [0, 1]. Unused with ``test_root``.
        val_root: Where the validation images are.
        test_root: Where the test images are.
        predict_root: Where the images to predict are; the default is the test images.
        num_workers: Processes that read ahead.
        max_pixels: Larger images are skipped, not decompressed; above 178 956 970 Pillow refuses in any case.
        max_file_bytes: Images of larger files are skipped, not read.
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
        max_pixels: int = MAX_PIXELS,
        max_file_bytes: int = MAX_FILE_BYTES,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, seed, num_workers)
        self.root, self.image_size, self.max_pixels, self.max_file_bytes = root, image_size, max_pixels, max_file_bytes
        self.fit: Fit = fit
        self.val_share, self.test_share = val_share, test_share
        self.roots = {"val": val_root, "test": test_root, "predict": predict_root}

    @property
    def reading(self) -> Reading:
        """How pictures are read."""
        return Reading(self.image_size, self.fit, self.max_pixels, self.max_file_bytes)

    def source(self, stage: Stage) -> ImageSource | None:
        """Images of the stage's own root, or of its share of ``root``."""
        own = self.roots.get(stage)
        if own:
            return self.open(own, stage, None)
        if stage == "predict":
            return self.source("test")
        shares = self.shares()
        return None if stage != "train" and not shares[stage] else self.open(self.root, stage, shares)

    def shares(self) -> dict[str, float]:
        """Of ``root`` that validation and test take."""
        shares = {"val": self.val_share, "test": self.test_share}
        return {stage: 0.0 if self.roots[stage] else share for stage, share in shares.items()}

    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """The images of a root, or of a stage's share of it."""
        raise NotImplementedError

    def part(
        self, count: int, name: Callable[[int], str], stage: Stage, shares: dict[str, float] | None, what: str = "images"
    ) -> Sequence[int]:
        """Positions below ``count`` whose names belong to a stage.

        Raises:
            ValueError: None does.
        """
        if shares is None or (stage == "train" and not any(shares.values())):
            return range(count)
        val_share, test_share = shares["val"], shares["test"]
        positions = array("q", (i for i in range(count) if split_of(name(i), val_share, test_share) == stage))
        if not positions:
            raise ValueError(
                f"none of the {count} {what} in data.root={self.root!r} fell into the {stage} split "
                f"(data.val_share={val_share}, data.test_share={test_share}): change the shares"
                + (f" or set data.{stage}_root" if stage != "train" else "")
            )
        return positions


def key_of(stage: Stage, shares: dict[str, float] | None) -> str:
    """The setting that names a stage's root."""
    return f"data.{stage}_root" if shares is None else "data.root"


def role_of(stage: Stage, shares: dict[str, float] | None) -> str:
    """What makes ids of an own root differ from those of ``root``."""
    return f"{stage}:" if shares is None else ""


class ImageFolderData(PhotographData):
    """A folder of images, searched recursively.

    Files are split by the hash of their relative name, or come from folders of their own. Captions, which only supervised
    training needs, lie beside the images: see `uae.data.captions`. Arguments: see `PhotographData`.
    """

    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """Files of a folder."""
        key = key_of(stage, shares)
        names = list_images(root, key)
        names = [names[position] for position in self.part(len(names), names.__getitem__, stage, shares)]
        captions = CaptionFiles(root, key)
        return FolderSource(root, names, self.reading, role_of(stage, shares), stage == "train", captions)

    def check_captions(self) -> None:
        """Raise unless every training and validation image has a caption; one look-up per image."""
        stages: tuple[Stage, ...] = ("train", "val")
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


class StreamedData(PhotographData):
    """Photographs that can be read from front to back only, see `uae.data.streaming`.

    Args:
        epoch_size: Training images per epoch, of all processes together. Epochs have their own order, so one that is longer
            than the data repeats them and a shorter one takes a part.
        eval_size: Images per validation, test or prediction, of all processes together: the first of the shards.
        shuffle_buffer: Encoded images that each lane holds and draws from; fewer if ``max_file_bytes`` are reached.
        lanes: Streams that feed a batch of all processes together; the default is one per process. The order of the images
            survives another number of processes if this and the images per step of all processes stay the same.
        kwargs: See `PhotographData`.
    """

    def __init__(
        self,
        epoch_size: int = 10_000,
        eval_size: int = 512,
        shuffle_buffer: int = 256,
        lanes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.epoch_size, self.eval_size, self.shuffle_buffer, self.lanes = epoch_size, eval_size, shuffle_buffer, lanes

    def stream(self, shards: Shards, stage: Stage, role: str) -> ImageSource:
        """Shards as the source of a stage."""
        if stage != "train":
            return SequentialSource(shards, self.reading, self.eval_size, role)
        world_size = self._rank()[1]
        images, lanes = self.batch_size * world_size, self.lanes or world_size
        if images % lanes or lanes % world_size:
            raise ValueError(
                f"data.lanes={lanes} must divide the {images} images per step of all processes and be a multiple of their "
                f"number, {world_size}: change data.init_args.lanes or batch_size"
            )
        shuffle = not (self.trainer and self.trainer.overfit_batches)
        readers = max(1, self.num_workers)
        order = (self.seed, self.shuffle_buffer, shuffle)
        return StreamSource(shards, self.reading, self.epoch_size, images, lanes, readers, *order)

    def train_batches(self, source: ImageSource, rank: int, world_size: int, shuffle: bool) -> TrainBatches:
        """A stream has its own order."""
        if not isinstance(source, StreamSource):
            return super().train_batches(source, rank, world_size, shuffle)
        return StreamBatches(len(source), self.batch_size, rank, world_size)


class WebDatasetData(StreamedData):
    """Tar shards in the layout of WebDataset: ``<key>.jpg``, and ``<key>.txt`` if there is a caption.

    ``root`` is a folder of them, a file, or a pattern such as ``shards/{0000..0127}.tar`` or ``https://host/{000..099}.tar.gz``.
    Whole shards are split by the hash of their names, or validation has a root of its own. Arguments: see `StreamedData`.
    """

    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """Shards of a root."""
        folder, names = list_shards(root, key_of(stage, shares))
        names = [names[position] for position in self.part(len(names), names.__getitem__, stage, shares, "shards")]
        return self.stream(TarShards(folder, names, self.max_file_bytes), stage, role_of(stage, shares))


class TableData(StreamedData):
    """Tables with an image column: Parquet files, or data sets of Hugging Face ``datasets`` (on disk or from the hub).

    ``root`` is a Parquet file, a pattern such as ``data/train-*.parquet``, a folder of Parquet files, a folder written by
    ``save_to_disk``, or ``name:split`` of the hub, e.g. ``org/name:train``. Every epoch sees each row once; with
    ``streaming`` nothing is listed or downloaded first, and `StreamedData` says what an epoch is. Rows are split by the hash
    of their numbers; with ``streaming`` set ``val_root``, e.g. ``org/name:validation``.

    Args:
        image_column: Column of the images: bytes, ``{"bytes", "path"}`` or paths relative to the files' folder.
        caption_column: Column of the captions, if supervised training needs them.
        subset: Of a data set on the hub that has several.
        streaming: Read a data set of ``datasets`` from front to back.
        kwargs: See `StreamedData`.
    """

    def __init__(
        self,
        image_column: str = "image",
        caption_column: str | None = None,
        subset: str | None = None,
        streaming: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_column, self.caption_column, self.subset, self.streaming = image_column, caption_column, subset, streaming

    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """Rows of a root."""
        key, role = key_of(stage, shares), role_of(stage, shares)
        columns = self.image_column, self.caption_column
        files = None if self.streaming else list_tables(root, key)
        table: Table
        if files:
            table = ParquetTable(*files, *columns, key)
        else:
            found, split = load(root, self.subset, self.streaming, [name for name in columns if name], key)
            if self.streaming:
                return self.stream(HuggingFaceShards(found, split, *columns), stage, role)
            table = HuggingFaceTable(found, split, *columns)
        rows = self.part(len(table), table.name, stage, shares)
        return TableSource(table, rows, self.reading, role, replace=stage == "train")

    def shares(self) -> dict[str, float]:
        """A stream has no part that could be kept without reading all of it."""
        return {"val": 0.0, "test": 0.0} if self.streaming else super().shares()

    def check_captions(self) -> None:
        """Raise unless captions have a column."""
        if not self.caption_column:
            raise ValueError(f"data.root={self.root!r} is read without captions: set data.init_args.caption_column")
