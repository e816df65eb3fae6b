"""Photographs as data modules: folders, tables and tar shards, with the same arguments."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Callable, Sequence
from typing import Any

from uae.data.captions import METADATA, CaptionFiles
from uae.data.folder import FolderSource, find_images
from uae.data.huggingface import HuggingFaceShards, HuggingFaceTable, open_dataset
from uae.data.module import ImageData, Stage
from uae.data.sampler import ImageSource, TrainBatches
from uae.data.shards import TarShards, find_shards
from uae.data.source import NO_CAPTION, split_of
from uae.data.streaming import SequentialSource, Shards, StreamBatches, StreamSource
from uae.data.tables import Columns, ParquetTable, TableSource, list_tables
from uae.data.tally import Tally
from uae.files.folders import shown
from uae.files.pictures import MAX_FILE_BYTES, MAX_PIXELS, Fit, Reading

OTHER_SPLIT, WITHOUT_CAPTION = "of another split", "without a caption"


class PhotographData(ImageData):
    """Images of any size, format and mode, which are found under a ``root`` and split by the hash of their names.

    Unreadable images are skipped, counted, and named in ``skipped.rank<rank>.jsonl`` in the log directory.

    Args:
        root: Where the training images are. Validation and test images are taken from there, too, unless they have a root
            of their own.
        image_size: Side of the square images that come out, in pixels.
        fit: How an image becomes square: "crop" its centre, "pad" it with white, or "squash" it.
        batch_size: Images per training batch and process.
        eval_batch_size: Images per validation, test or prediction batch and process, at most.
        val_share: Share of the images in ``root`` that is kept for validation, in [0, 1]. 0 means that there is no
            validation. Not used if ``val_root`` is given.
        test_share: Share of the images in ``root`` that is kept for testing, in [0, 1]. Not used if ``test_root`` is given.
        val_root: Where the validation images are.
        test_root: Where the test images are.
        predict_root: Where the images to predict are. None takes the test images.
        num_workers: The number of processes that read ahead; 0 reads in the training process.
        max_pixels: Images with more pixels are skipped without decompressing them. Pillow itself allows 178 956 970.
        max_file_bytes: Images in larger files are skipped without reading them, in bytes.
        seed: Seed of the order of training images.
    """

    def __init__(
        self,
        root: str,
        image_size: int = 512,
        fit: Fit = "crop",
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
        self.root, self.image_size = root, image_size
        self.reading = Reading(image_size, fit, max_pixels, max_file_bytes)
        self.val_share, self.test_share = val_share, test_share
        self.roots = {"val": val_root, "test": test_root, "predict": predict_root}
        for key, given in {"root": root, **{f"{stage}_root": own for stage, own in self.roots.items()}}.items():
            if given is not None and not given.strip():
                allowed = "a place of images" + " or null" * (key != "root")
                raise ValueError(f"data.init_args.{key}={given!r} is empty; allowed: {allowed}; change data.init_args.{key}")

    def source(self, stage: Stage) -> ImageSource | None:
        """The images of the stage's own root, or of its share of ``root``."""
        own = self.roots.get(stage)
        if own is not None:
            return self.open(own, stage, None)
        if stage == "predict":
            return self.source("test")
        shares = self.shares()
        return None if stage != "train" and not shares[stage] else self.open(self.root, stage, shares)

    def shares(self) -> dict[str, float]:
        """The shares of ``root`` that validation ("val") and test ("test") take; 0 if they have a root of their own."""
        shares = {"val": self.val_share, "test": self.test_share}
        return {stage: 0.0 if self.roots[stage] is not None else share for stage, share in shares.items()}

    @abstractmethod
    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """Find the images of a stage.

        Args:
            root: Where they are.
            stage: What they are for.
            shares: The shares of ``root`` that validation and test take. None if all of it belongs to the stage.
        """

    def part(
        self, count: int, name: Callable[[int], str], stage: Stage, shares: dict[str, float] | None, what: str = "images"
    ) -> Sequence[int]:
        """The positions of the images (or shards) that belong to a stage.

        Args:
            count: The number of images.
            name: Gives the name of the image at a position.
            stage: What they are for.
            shares: See `open`.
            what: What is counted, for the error.

        Raises:
            ValueError: None belongs to the stage.
        """
        if shares is None or (stage == "train" and not any(shares.values())):
            return range(count)
        val_share, test_share = shares["val"], shares["test"]
        positions = array("q", (i for i in range(count) if split_of(name(i), val_share, test_share) == stage))
        if not positions:
            raise ValueError(
                f"none of the {count} {what} in data.init_args.root={self.root!r} fell into the {stage} split: change "
                f"data.init_args.val_share={val_share} and data.init_args.test_share={test_share}"
                + (f", or set data.init_args.{stage}_root" if stage != "train" else "")
            )
        return positions


def captioned(names: Sequence[str], missing: dict[str, str], stage: Stage, advice: str) -> list[str]:
    """The names of images that have captions.

    Args:
        names: The names of all images.
        missing: The names of those whose captions are missing or cannot be read, with the reasons.
        stage: What they are for, for the error.
        advice: What to do about it, for the error.

    Raises:
        ValueError: There is none.
    """
    left = [name for name in names if name not in missing]
    if not left:
        some = ", ".join(shown(name) for name in list(missing)[:3]) + ", ..." * (len(missing) > 3)
        reason = next((f"; {reason}" for reason in missing.values() if reason != NO_CAPTION), "")
        raise ValueError(f"{len(missing)} of {len(names)} {stage} images have no caption ({some}{reason}): {advice}")
    return left


def key_of(stage: Stage, shares: dict[str, float] | None) -> str:
    """The setting of the configuration that names the root of a stage; ``shares`` is None if it is the stage's own."""
    return f"data.init_args.{stage}_root" if shares is None else "data.init_args.root"


def role_of(stage: Stage, shares: dict[str, float] | None) -> str:
    """The prefix of names in ids: images of a stage's own root must not have ids of images in ``root``."""
    return f"{stage}:" if shares is None else ""


class ImageFolderData(PhotographData):
    """A folder of images and its subfolders.

    Captions, which only supervised training needs, are in files beside the images, see `uae.data.captions`. The arguments
    are those of `PhotographData`.
    """

    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """Find the image files of a stage."""
        key = key_of(stage, shares)
        found = find_images(root, key)
        tally = Tally(len(found.names), "files").skip(found.skipped)
        names = [
            found.names[position] for position in self.part(len(found.names), lambda place: shown(found.names[place]), stage, shares)
        ]
        tally.leave_out(len(found.names) - len(names), OTHER_SPLIT)
        captions = None if self.captions == "unread" else CaptionFiles(root, key)
        role, needed = role_of(stage, shares), self.captions == "needed"
        source = FolderSource(root, names, self.reading, role, stage == "train", captions, needed)
        if needed:
            missing = source.without_caption()
            source.names = captioned(names, missing, stage, f"put <name>.txt beside each or list them in a {METADATA} "
                                     f"(file_name, text), or change {key}")  # fmt: skip
            tally.recount(missing, WITHOUT_CAPTION)
        source.tallies = [tally]
        return source


class StreamedData(PhotographData):
    """Photographs that can only be read from front to back, see `uae.data.streaming`.

    Args:
        epoch_size: Training images per epoch, of all processes together. Every epoch has its own order. An epoch that is
            longer than the data repeats them, a shorter one takes a part of them.
        eval_size: Images per validation, test or prediction, of all processes together: the first ones of the shards.
        shuffle_buffer: The number of encoded images that each lane holds and draws from. It holds fewer if they have more
            than ``max_file_bytes`` together.
        lanes: The number of streams that feed a batch of all processes together; None takes one per process. The order of
            the images does not depend on the number of processes if this and their images per step stay the same.
        kwargs: The arguments of `PhotographData`.
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

    def stream(self, shards: Shards, stage: Stage, role: str) -> StreamSource | SequentialSource:
        """Shards as the images of a stage.

        Raises:
            ValueError: The lanes cannot be shared out evenly among the processes and the images of a step.
        """
        if stage != "train":
            return SequentialSource(shards, self.reading, self.eval_size, role, self.captions == "needed")
        world_size = self._rank()[1]
        images, lanes = self.batch_size * world_size, self.lanes or world_size
        if images % lanes or lanes % world_size:
            raise ValueError(
                f"data.init_args.lanes={lanes} must divide the {images} images per step of all processes and be a multiple of "
                f"their number, {world_size}: change data.init_args.lanes or data.init_args.batch_size"
            )
        readers = max(1, self.num_workers)
        order = (self.seed, self.shuffle_buffer, self.shuffles, self.captions == "needed")
        return StreamSource(shards, self.reading, self.epoch_size, images, lanes, readers, *order)

    def train_batches(self, source: ImageSource, rank: int, world_size: int) -> TrainBatches:
        """The positions of every training batch of one process. A stream shuffles its images itself."""
        if not isinstance(source, StreamSource):
            return super().train_batches(source, rank, world_size)
        return StreamBatches(len(source), self.batch_size, rank, world_size)


class WebDatasetData(StreamedData):
    """Tar shards in the layout of WebDataset: ``<key>.jpg``, and ``<key>.txt`` if there is a caption.

    ``root`` is a folder of them, a file, or a pattern such as ``shards/{0000..0127}.tar`` or
    ``https://host/{000..099}.tar.gz``. A shard belongs to one split as a whole, by the hash of its name, unless the splits
    have roots of their own. The arguments are those of `StreamedData`.
    """

    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """Find the shards of a stage."""
        folder, found = find_shards(root, key_of(stage, shares))
        tally = Tally(len(found.names), "files").skip(found.skipped)
        positions = self.part(len(found.names), lambda place: shown(found.names[place]), stage, shares, "shards")
        tally.leave_out(len(found.names) - len(positions), OTHER_SPLIT)
        names = [found.names[position] for position in positions]
        shards = TarShards(folder, names, self.reading.max_file_bytes, None if self.captions == "unread" else "txt")
        source = self.stream(shards, stage, role_of(stage, shares))
        source.tallies = [tally]
        return source


class TableData(StreamedData):
    """Tables with a column of images: Parquet files, or data sets of Hugging Face ``datasets`` (on disk or on the hub).

    ``root`` is a Parquet file, a pattern such as ``data/train-*.parquet``, a folder of Parquet files, a folder written by
    ``save_to_disk``, or ``name:split`` of the hub such as ``org/name:train``. Every epoch sees each row once, and rows are
    split by the hash of their numbers.

    With ``streaming``, nothing is listed or downloaded first, and `StreamedData` says what an epoch is. There are no splits:
    for validation give ``val_root``, e.g. ``org/name:validation``.

    Args:
        image_column: Column of the images: bytes, ``{"bytes": ..., "path": ...}``, or paths relative to the files' folder.
        caption_column: Column of the captions, for supervised training. None reads no captions.
        subset: The name of the subset, for data sets on the hub that have several.
        streaming: Whether to read a data set of ``datasets`` from front to back.
        kwargs: The arguments of `StreamedData`.
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
        self.columns, self.subset, self.streaming = Columns(image_column, caption_column), subset, streaming

    def open(self, root: str, stage: Stage, shares: dict[str, float] | None) -> ImageSource:
        """Find the rows of a stage."""
        key, role, needed = key_of(stage, shares), role_of(stage, shares), self.captions == "needed"
        if needed and not self.columns.caption:
            raise ValueError(f"{key}={root!r} is read without captions: set data.init_args.caption_column")
        columns = self.columns if self.captions != "unread" else Columns(self.columns.image)
        files = list_tables(root, key)
        tallies = [Tally(len(files[1].names), "files").skip(files[1].skipped)] if files else []
        table: ParquetTable | HuggingFaceTable | HuggingFaceShards
        if files and not self.streaming:
            table = ParquetTable(files[0], files[1].names, columns, key)
        else:
            table = open_dataset(root, self.subset, self.streaming, columns, key)
        if isinstance(table, HuggingFaceShards):
            stream = self.stream(table, stage, role)
            stream.tallies = tallies or [Tally(len(table), "shards")]
            return stream
        rows = self.part(len(table), table.name, stage, shares)
        tally = Tally(len(table), "rows").leave_out(len(table) - len(rows), OTHER_SPLIT)
        if needed:
            without = set(table.without_caption())
            missing = {table.name(row): NO_CAPTION for row in rows if row in without}
            advice = f"correct data.init_args.caption_column={columns.caption!r} or {key}"
            captioned(list(map(table.name, rows)), missing, stage, advice)
            rows = array("q", (row for row in rows if row not in without))
            tally.recount(missing, WITHOUT_CAPTION)
        source = TableSource(table, rows, self.reading, role, stage == "train", needed)
        source.tallies = [*tallies, tally]
        return source

    def shares(self) -> dict[str, float]:
        """The shares of ``root`` for validation and test; none of a stream, all of which would have to be read for it."""
        return {"val": 0.0, "test": 0.0} if self.streaming else super().shares()
