"""Caption and reconstruct a folder of images with any configured system, to be scored by ``uae.bench score``.

python -m uae.bench run --config FILE [--config FILE ...] [--ckpt_path FILE] --sources DIR --output DIR [--key value]

The command works as ``uae.cli predict`` does, on as many processes as ``--trainer.devices`` says. A run that was killed and is
started again continues after the last finished image. Images whose source has changed are made again, and those whose source is
gone are moved aside.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback
from tqdm import tqdm

from callbacks.predictions import ROWS, Predictions, check_apart, collect, file_name, finished, json_lines
from uae.bench.fingerprints import sha256
from uae.bench.generate import parse_job
from uae.bench.output_folder import ASIDE, SOURCE, WEIGHTS, check_beside, claim_folder, set_aside
from uae.bench.system import auto_encoder, identity, weights_of
from uae.cli.command import CLI, RunTrainer
from uae.data.folder import FolderSource, list_images
from uae.data.module import ImageData, Stage
from uae.data.photographs import PhotographData
from uae.data.sampler import ImageSource
from uae.files.folders import shown
from uae.files.pictures import Reading, UnreadableImageError, read_picture
from uae.files.whole import write_whole

NOT_USED = ("unified_score", "metrics")  # settings of a model whose checkpoints change nothing that is written
ROLE = "predict:"  # the ids of images, and with them the seeds, are those of `uae.cli predict`


@dataclass(frozen=True)
class ReconstructionJob:
    """A folder of images to reconstruct.

    Args:
        sources: Folder of the source images.
        output: Folder of the captions and reconstructions.
        image_size: Side of the square images that the system sees, in pixels; None takes the configuration's.
        fit: How a source becomes square; None takes the configuration's.
        batch_size: Number of images per batch and process; None takes the configuration's.
    """

    sources: str
    output: str
    image_size: int | None = None
    fit: Literal["crop", "pad", "squash"] | None = None
    batch_size: int | None = None


def reconstruction_job(
    sources: str,
    output: str,
    image_size: int | None = None,
    fit: Literal["crop", "pad", "squash"] | None = None,
    batch_size: int | None = None,
) -> ReconstructionJob:
    """Caption and reconstruct a folder of images. All other options are those of uae.cli predict (--config, --ckpt_path, ...).

    Args:
        sources: Folder of the images, searched recursively.
        output: Folder of the reconstructions (PNG) and of captions.json; images that are there are not made again.
        image_size: Side of the square images that the system sees; the default is the configuration's data.image_size.
        fit: How a source becomes square; the default is the configuration's data.fit.
        batch_size: Images per batch and process; the default is the configuration's data.eval_batch_size.
    """
    return ReconstructionJob(sources, output, image_size, fit, batch_size)


class Remaining(ImageData):
    """The images of a folder that are not reconstructed yet, all of them readable.

    Args:
        root: Folder of the images.
        names: Paths of the images, relative to the folder.
        reading: How an image file becomes a square tensor.
        batch_size: Number of images per batch and process.
        num_workers: Number of processes that read ahead.
    """

    def __init__(self, root: str, names: list[str], reading: Reading, batch_size: int, num_workers: int) -> None:
        super().__init__(batch_size, batch_size, seed=0, num_workers=num_workers)
        self.root, self.names, self.reading = root, names, reading

    def source(self, stage: Stage) -> ImageSource | None:
        """The same images for every stage."""
        return FolderSource(self.root, self.names, self.reading, role=ROLE)


class Continued(Predictions):
    """Keeps what an earlier run has made of sources that are still the same, and moves the rest aside.

    Args:
        folder: Folder that is written.
        digests: Name of each source to the sha256 of its file.
    """

    def __init__(self, folder: str, digests: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.digests = digests

    def prepare(self, folder: Path) -> None:
        """Put the rows that stay into one file, so that no row of another process hides a newer one, and move the others aside."""
        rows = finished(folder)
        kept = {name: row for name, row in rows.items() if self.digests.get(name) == row.get(SOURCE)}
        others = [row for name, row in rows.items() if name not in kept]
        files = sorted(folder.glob(ROWS))
        first = folder / ROWS.replace("*", "0")
        if others:
            set_aside(folder, [folder / row["reconstruction"] for row in others])
            with (folder / ASIDE / "captions.jsonl").open("ab") as out:
                out.write(json_lines(others))
        if files:
            write_whole(first, json_lines(kept.values()))
        for file in files:
            if file != first:
                file.unlink()
        if others:
            collect(folder)  # until the run is complete, these are all captions

    def about(self, name: str) -> dict[str, Any]:
        """The digest of the source, by which a later run knows whether it is still the same."""
        return {SOURCE: self.digests[name]}


class Reconstruction(CLI):
    """``predict`` with the images and the output folder of a job in place of the configuration's.

    Args:
        job: Images to reconstruct and where to write them.
        words: All other words of the command line; they describe the system.
    """

    def __init__(self, job: ReconstructionJob, words: Sequence[str]) -> None:
        self.job, self.left = job, list[str]()
        self.writer = Continued(job.output, {})
        super().__init__(["predict", *words, "--trainer.logger=false"])

    def instantiate_classes(self) -> None:
        """Find the images that are left to do before weights are loaded.

        Raises:
            ValueError: The output folder was written by another system, or two sources have one output.
        """
        super().instantiate_classes()
        auto_encoder(self.model)
        data = self.datamodule
        reading = _reading(self.job, data)
        root = Path(self.job.sources).expanduser()
        files = {shown(name): name for name in list_images(self.job.sources, "sources") if not (root / name).is_dir()}
        names = list(files)
        self._claim(names, reading)
        rows = finished(Path(self.job.output))
        digests, broken = survey(root, files, rows, reading)
        done = {name for name, row in rows.items() if digests.get(name) == row.get(SOURCE)}
        self.left = [files[name] for name in names if name not in done and name not in broken]
        self.writer.digests = digests
        _callbacks(self.trainer).append(self.writer)
        self.datamodule = Remaining(
            self.job.sources,
            self.left,
            reading,
            self.job.batch_size or (data.eval_batch_size if isinstance(data, ImageData) else 1),
            data.num_workers if isinstance(data, ImageData) else 0,
        )
        if self.trainer.is_global_zero:
            print(f"{len(names)} images: {len(done)} done, {len(self.left)} to do, {len(broken)} unreadable")
            for name, reason in broken.items():
                print(f"* unreadable: {name} ({reason})")
            for name in sorted(rows.keys() - done):
                print(f"* the source {'has changed' if name in digests else 'is gone'}, what was made of it goes to {ASIDE}: {name}")

    def _claim(self, names: Sequence[str], reading: Reading) -> None:
        """Check that the output folder is of this system, and claim it as soon as weights and checkpoint are loaded.

        A run that fails before leaves the folder to the next one.
        """
        config, output = self.config["predict"], Path(self.job.output)
        sources = check_beside(self.job.sources, output)
        files = {name: file_name(name) for name in names}
        check_apart((file, name) for name, file in files.items())
        outputs = [output / file for file in files.values()]
        claimed = {**identity(config, NOT_USED), "sources": str(sources), "reading": asdict(reading)}
        claim_folder(output, claimed, outputs, write=False)

        def claim(*_: object) -> None:
            claimed[WEIGHTS] = weights_of(config, NOT_USED, claimed[WEIGHTS])  # with those that were downloaded meanwhile
            claim_folder(output, claimed, outputs)

        _callbacks(self.trainer).append(LambdaCallback(on_predict_start=claim))

    def instantiate_trainer(self, **kwargs: Any) -> RunTrainer:
        """The configured trainer without what it would write itself."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks = _callbacks(trainer)
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, Predictions)]
        return trainer

    @contextmanager
    def _own_folder(self, subcommand: str) -> Iterator[None]:
        """The output folder of the job, which may be continued; `_claim` has checked it."""
        self.trainer.results = Path(self.job.output)
        yield

    def _run_subcommand(self, subcommand: str) -> None:
        if self.left:
            super()._run_subcommand(subcommand)
        elif self.trainer.is_global_zero:
            self.writer.prepare(Path(self.job.output))
            print(f"{len(collect(Path(self.job.output)))} captions and reconstructions in {self.job.output}")


def _callbacks(trainer: Trainer) -> list[Callback]:
    """The callbacks of a trainer, a list that may be changed; Lightning does not declare the attribute."""
    callbacks: list[Callback] = vars(trainer)["callbacks"]
    return callbacks


def _reading(job: ReconstructionJob, data: object) -> Reading:
    """How sources are read: as the job says, else as the configured data are."""
    reading = data.reading if isinstance(data, PhotographData) else None
    size = job.image_size if job.image_size is not None else reading.size if reading else None
    if size is None:
        raise ValueError(f"data={type(data).__name__} does not say how large images are; give --image_size (24 for scenes)")
    if size < 1:
        raise ValueError(f"--image_size {size}: allowed: 1 or more")
    return Reading(size, job.fit or (reading.fit if reading else "crop"))


def survey(
    root: Path, files: Mapping[str, str], rows: Mapping[str, Mapping[str, Any]], reading: Reading, workers: int = 4
) -> tuple[dict[str, str], dict[str, str]]:
    """What the sources hold now, and which cannot be read. Batches must be full on every process, so this is known beforehand.

    Args:
        root: Folder of the sources.
        files: Name of each source, as rows have it, to its path relative to the folder.
        rows: Rows of earlier runs; a source that has its row is not decoded again.
        reading: Limits of what is read.
        workers: Number of threads.

    Returns:
        Name to sha256 of every file, and name to reason of those that cannot be read.
    """

    def check(name: str) -> tuple[str, str]:
        file, digest = root / files[name], ""
        try:
            if file.is_file():  # to open a pipe would block
                digest = sha256(file)
            if not digest or rows.get(name, {}).get(SOURCE) != digest:
                read_picture(file, reading.max_pixels, reading.max_file_bytes)
        except (UnreadableImageError, OSError) as error:
            return digest, str(error)
        return digest, ""

    with ThreadPoolExecutor(workers) as pool:
        found = list(tqdm(pool.map(check, files), total=len(files), unit="image", desc="checking", disable=len(files) < 100))
    by_name = dict(zip(files, found, strict=True))
    return {name: digest for name, (digest, _) in by_name.items()}, {name: reason for name, (_, reason) in by_name.items() if reason}


def main(args: Sequence[str]) -> None:
    """Run the command with the words behind its name."""
    asked, system = parse_job("run", reconstruction_job, args, "run")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        Reconstruction(asked, system)
