"""Caption and reconstruct a folder of images with any configured system, to be scored by ``uae.bench score``.

python -m uae.bench run --config FILE [--config FILE ...] [--ckpt_path FILE] --sources DIR --output DIR [--key value]

The command works as ``uae.cli predict`` does, on as many processes as ``--trainer.devices`` says. A run that was killed and is
started again continues after the last finished image.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LambdaCallback
from tqdm import tqdm

from callbacks.predictions import Predictions, collect, finished
from uae.bench.fingerprints import sha256
from uae.bench.generate import claim_folder, parse_job
from uae.bench.system import auto_encoder
from uae.cli import CLI
from uae.data.folder import FolderSource, list_images
from uae.data.module import ImageData, Stage
from uae.data.photographs import PhotographData
from uae.data.sampler import ImageSource
from uae.files.pictures import Reading, UnreadableImageError, read_picture

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


class Reconstruction(CLI):
    """``predict`` with the images and the output folder of a job in place of the configuration's.

    Args:
        job: Images to reconstruct and where to write them.
        words: All other words of the command line; they describe the system.
    """

    def __init__(self, job: ReconstructionJob, words: Sequence[str]) -> None:
        self.job, self.left = job, list[str]()
        super().__init__(["predict", *words, "--trainer.logger=false"])

    def instantiate_classes(self) -> None:
        """Find the images that are left to do before weights are loaded.

        Raises:
            ValueError: The output folder was written by another system.
        """
        super().instantiate_classes()
        config, output = self.config["predict"], Path(self.job.output)
        auto_encoder(self.model)
        data = self.datamodule
        reading = _reading(self.job, data)
        names = list_images(self.job.sources, "sources")
        identity = {
            "model": config.model.as_dict(), "checkpoint": _checkpoint(config.ckpt_path),
            "sources": str(Path(self.job.sources).expanduser().resolve()), "reading": asdict(reading),
        }  # fmt: skip
        claim_folder(output, identity, write=False)
        # The folder is claimed once weights and checkpoint are loaded: a run that fails before leaves it to the next one.
        _callbacks(self.trainer).append(LambdaCallback(on_predict_start=lambda *_: claim_folder(output, identity)))
        done = finished(output)
        self.left, broken = readable(Path(self.job.sources).expanduser(), [n for n in names if n not in done], reading)
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

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The configured trainer, which writes into the job's folder."""
        trainer = super().instantiate_trainer(**kwargs)
        callbacks = _callbacks(trainer)
        callbacks[:] = [callback for callback in callbacks if not isinstance(callback, Predictions)]
        callbacks.append(Predictions(self.job.output, resume=True))
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        if self.left:
            super()._run_subcommand(subcommand)
        elif self.trainer.is_global_zero:
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


def _checkpoint(path: str | None) -> str | None:
    """The sha256 of a checkpoint's content, since the file behind a name such as ``last.ckpt`` changes."""
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path!r}; correct --ckpt_path (a file, or the folder of a sharded run)")
    return None if path is None else sha256(path)


def readable(root: Path, names: Sequence[str], reading: Reading, workers: int = 4) -> tuple[list[str], dict[str, str]]:
    """The files that can be read, and why the others cannot. Batches must be full on every process, so this is known beforehand."""

    def check(name: str) -> str:
        try:
            read_picture(root / name, reading.max_pixels, reading.max_file_bytes)
        except UnreadableImageError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(workers) as pool:
        reasons = list(tqdm(pool.map(check, names), total=len(names), unit="image", desc="checking", disable=len(names) < 100))
    by_name = dict(zip(names, reasons, strict=True))
    return [name for name in names if not by_name[name]], {name: reason for name, reason in by_name.items() if reason}


def main(args: Sequence[str]) -> None:
    """Run the command with the words behind its name."""
    asked, system = parse_job("run", reconstruction_job, args, "run")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        Reconstruction(asked, system)
