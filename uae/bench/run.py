"""Caption and reconstruct a folder of images with any configured system, to be scored by ``uae.bench score``.

python -m uae.bench run --config FILE [--config FILE ...] [--ckpt_path FILE] --sources DIR --output DIR [--key value]

The path of ``uae.cli predict``, on as many processes as ``--trainer.devices`` says; killed and started again, it goes on.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from tqdm import tqdm

from callbacks.predictions import Predictions, collect, finished
from uae.bench.fingerprints import sha256
from uae.bench.generate import claim_folder, parse_job
from uae.bench.system import check_auto_encoder
from uae.cli import CLI
from uae.data.folder import FolderSource, list_images
from uae.data.module import ImageData, Stage
from uae.data.sampler import ImageSource
from uae.files.pictures import Reading, UnreadableImageError, read_picture

ROLE = "predict:"  # ids, and with them seeds, as in `uae.cli predict`


@dataclass(frozen=True)
class ReconstructionJob:
    """What to reconstruct.

    Args:
        sources: Folder of images.
        output: Where captions and reconstructions go.
        image_size: Side of the square images that the system sees; None is the configuration's.
        fit: How a source becomes square; None is the configuration's.
        batch_size: Images per batch and process; None is the configuration's.
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
    """The images of a folder that are not done yet; every one can be read.

    Args:
        root: The folder.
        names: Relative.
        reading: How they are read.
        batch_size: Images per batch and process.
        num_workers: Processes that read ahead.
    """

    def __init__(self, root: str, names: list[str], reading: Reading, batch_size: int, num_workers: int) -> None:
        super().__init__(batch_size, batch_size, seed=0, num_workers=num_workers)
        self.root, self.names, self.reading = root, names, reading

    def source(self, stage: Stage) -> ImageSource | None:
        """The files."""
        return FolderSource(self.root, self.names, self.reading, role=ROLE)


class Reconstruction(CLI):
    """``predict`` with the job's images and folder in place of the configuration's.

    Args:
        job: What to do.
        words: The rest of the command line.
    """

    def __init__(self, job: ReconstructionJob, words: Sequence[str]) -> None:
        self.job, self.left = job, list[str]()
        super().__init__(["predict", *words, "--trainer.logger=false"])

    def instantiate_classes(self) -> None:
        """Look for what is left to do before anything is loaded, and refuse another system's folder."""
        super().instantiate_classes()
        config, output = self.config["predict"], Path(self.job.output)
        check_auto_encoder(self.model)
        reading = _reading(self.job, self.datamodule)
        names = list_images(self.job.sources, "sources")
        identity = {
            "model": config.model.as_dict(), "checkpoint": _checkpoint(config.ckpt_path),
            "sources": str(Path(self.job.sources).expanduser().resolve()), "reading": asdict(reading),
        }  # fmt: skip
        claim_folder(output, identity, write=False)
        # Signed when weights and checkpoint are in place: a run that fails before leaves the folder to the next one.
        self.trainer.callbacks.append(LambdaCallback(on_predict_start=lambda *_: claim_folder(output, identity)))  # type: ignore[attr-defined]
        done = finished(output)
        self.left, broken = readable(Path(self.job.sources).expanduser(), [n for n in names if n not in done], reading)
        self.datamodule = Remaining(
            self.job.sources,
            self.left,
            reading,
            self.job.batch_size or getattr(self.datamodule, "eval_batch_size", 1),
            getattr(self.datamodule, "num_workers", 0),
        )
        if self.trainer.is_global_zero:
            print(f"{len(names)} images: {len(done)} done, {len(self.left)} to do, {len(broken)} unreadable")
            for name, reason in broken.items():
                print(f"* unreadable: {name} ({reason})")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The configured one, writing into the job's folder."""
        trainer = super().instantiate_trainer(**kwargs)
        others = [callback for callback in trainer.callbacks if not isinstance(callback, Predictions)]  # type: ignore[attr-defined]
        trainer.callbacks = [*others, Predictions(self.job.output, resume=True)]  # type: ignore[attr-defined]
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        if self.left:
            super()._run_subcommand(subcommand)
        elif self.trainer.is_global_zero:
            print(f"{len(collect(Path(self.job.output)))} captions and reconstructions in {self.job.output}")


def _reading(job: ReconstructionJob, data: Any) -> Reading:
    """How sources are read: as the job says, else as the configured data are."""
    configured = getattr(data, "reading", None)
    size = getattr(configured, "size", None) if job.image_size is None else job.image_size
    if size is None:
        raise ValueError(f"data={type(data).__name__} does not say how large images are: give --image_size (24 for scenes)")
    if size < 1:
        raise ValueError(f"--image_size {size}: allowed: 1 or more")
    return Reading(size, job.fit or getattr(configured, "fit", "crop"))


def _checkpoint(path: str | None) -> str | None:
    """Of its content: names change, and ``last.ckpt`` is another one every day."""
    if path is not None and not Path(path).exists():
        raise FileNotFoundError(f"no checkpoint at {path!r}: correct ckpt_path (a file, or the folder of a sharded run)")
    return None if path is None else sha256(path)


def readable(root: Path, names: Sequence[str], reading: Reading, workers: int = 4) -> tuple[list[str], dict[str, str]]:
    """Which files can be read, and why the others cannot: a system's batches must be full on every process."""

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
    """The command."""
    asked, system = parse_job("run", reconstruction_job, args, "run")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
        Reconstruction(asked, system)
