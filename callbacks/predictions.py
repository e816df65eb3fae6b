"""Writes the captions and reconstructions of ``predict``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torchvision.transforms.functional import to_pil_image

from uae.files.lines import lines_of
from uae.files.pictures import SUFFIXES
from uae.files.whole import write_whole

ROWS = "captions.rank*.jsonl"
CAPTIONS = "captions.json"


class Predictions(BasePredictionWriter):
    """Writes every reconstruction as a PNG named after its image, and all captions to ``captions.json``.

    Images are written atomically, and only then their row in ``captions.rank<rank>.jsonl``. So an image with a row is
    complete, whenever the run was killed.

    Args:
        folder: Folder that is written, in which no other run has written; None is ``predictions`` in the log directory.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__("batch")
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._names: dict[str, str] = {}  # file to the image that it is of
        self._path = self._file = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's files in a folder that all ranks agree on.

        Raises:
            ValueError: There is no folder.
        """
        log_dir = trainer.log_dir
        if self.folder is None and log_dir is None:
            raise ValueError(
                "callbacks.predictions.Predictions has no folder to write to: set callbacks.predictions.Predictions.folder"
            )
        self._path = Path(self.folder) if self.folder else Path(str(log_dir), "predictions")
        self._path.mkdir(parents=True, exist_ok=True)
        self._file = self._path / ROWS.replace("*", str(trainer.global_rank))
        if trainer.is_global_zero:
            self.prepare(self._path)
        trainer.strategy.barrier("the folder is prepared")
        self._rows = []
        self._names = {row["reconstruction"]: name for name, row in finished(self._path).items()}

    def prepare(self, folder: Path) -> None:
        """Refuse a folder in which another run has written; the first process does this before any other writes.

        Raises:
            ValueError: The folder has captions of another run.
        """
        if any(folder.glob(ROWS)) or (folder / CAPTIONS).exists():
            raise ValueError(
                f"folder={str(folder)!r} of callbacks.predictions.Predictions holds predictions of another run; allowed: an empty "
                "or new folder"
            )

    def about(self, name: str) -> dict[str, Any]:
        """More that the row of an image shall hold; a subclass may override this."""
        return {}

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the images of one batch, then their rows; every rank writes its own."""
        rewards = {name: value for name, value in prediction.items() if name.startswith("reward")}
        rows = []
        for i, name in enumerate(batch["name"]):
            file = file_name(name)
            check_apart([*self._names.items(), (file, name)])
            self._names[file] = name
            _save(prediction["reconstruction"][i], self._path / file)
            row = {"name": name, "id": int(batch["id"][i]), "caption": prediction["caption"][i], "reconstruction": file}
            rows.append(row | {key: float(value[i]) for key, value in rewards.items()} | self.about(name))
        self._rows += rows
        with self._file.open("ab") as out:
            out.write(json_lines(rows))

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the captions of all ranks and of the runs before, each image once, ordered by name."""
        parts = [self._rows]
        if torch.distributed.is_initialized():
            parts = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._rows)
        if trainer.is_global_zero:
            rows = collect(self._path, [row for part in parts for row in part])
            print(f"{len(rows)} captions and reconstructions in {self._path}")


def collect(folder: Path, rows: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Write ``captions.json``: one row per finished image, ordered by name; ``rows`` go before those of earlier runs.

    Raises:
        ValueError: Two images have been written to one file.
    """
    by_name = finished(folder) | {row["name"]: row for row in rows}
    ordered = [by_name[name] for name in sorted(by_name)]
    check_apart((row["reconstruction"], row["name"]) for row in ordered)
    text = json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / CAPTIONS, text.encode("utf-8", "backslashreplace"))
    return ordered


def json_lines(rows: Iterable[dict[str, Any]]) -> bytes:
    """Rows as JSON Lines. Names of files that are no UTF-8 hold halves of characters, which become escapes of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "backslashreplace")


def check_apart(named: Iterable[tuple[str, str]]) -> None:
    """Refuse names of images for which there is no file of their own.

    Args:
        named: The file and the name of each image.

    Raises:
        ValueError: Two images would be written to one file, or one to a file that is the folder of another.
    """
    names: dict[str, str] = {}
    for file, name in named:
        if names.setdefault(file, name) != name:
            raise ValueError(f"the images {names[file]!r} and {name!r} would both be written to {file!r}; rename one of them")
    for file, name in names.items():
        folder = next((str(part) for part in PurePosixPath(file).parents if str(part) in names), None)
        if folder is not None:
            raise ValueError(
                f"the image {names[folder]!r} would be written to {folder!r}, which must be a folder for {name!r}; rename one of them"
            )


def finished(folder: Path) -> dict[str, dict[str, Any]]:
    """The rows of all images that earlier runs have finished in a folder, by the image's name."""
    rows = (row for file in sorted(folder.glob(ROWS)) for row in _read(file))
    return {row["name"]: row for row in rows if (folder / row["reconstruction"]).is_file()}


def _read(file: Path) -> Iterator[dict[str, Any]]:
    for line in lines_of(file.read_bytes().decode(errors="replace")):
        try:
            row = json.loads(line)
        except ValueError:  # an incomplete line of a killed run
            continue
        if isinstance(row, dict) and {"name", "reconstruction", "caption"} <= row.keys():
            yield row


def _save(image_CHW: torch.Tensor, path: Path) -> None:
    content = BytesIO()
    to_pil_image(image_CHW.float().clamp(0, 1).cpu()).save(content, format="PNG")
    write_whole(path, content.getvalue())


def file_name(name: str) -> str:
    """A relative PNG path for an image's name: ``x.png`` stays, ``a.jpg`` becomes ``a.jpg.png``, and nothing leaves the folder.

    Files of different names do not collide, however odd these are: ``a.jpg.png`` becomes ``a.jpg.png.png``, and where characters
    had to be replaced, a hash of the whole name follows. Names without any suffix are the exception: ``a`` and ``a.png`` are one
    file, which `check_apart` refuses.

    Names come from the data and cannot be trusted: absolute paths, ``..``, backslashes and overlong parts are replaced.
    """
    plain = name.replace("\0", "").replace("\\", "/").encode("utf-8", "replace").decode()
    parts = [part for part in plain.split("/") if part not in ("", "..", ".")]
    file = PurePosixPath("/".join(map(_part, parts)) or "image")
    if plain != name:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        file = file.with_name(f"{file.stem}-{digest}{file.suffix}")
    written_as_it_is = file.suffix.lower() == ".png" and PurePosixPath(file.stem).suffix.lower() not in SUFFIXES
    return str(file) if written_as_it_is else f"{file}.png"


def _part(part: str) -> str:
    """A part of a path in at most 200 bytes. A cut part ends with a hash of the whole, so that names stay different."""
    encoded = part.encode("utf-8", "replace")
    if len(encoded) <= 200:
        return encoded.decode()
    return f"{encoded[:180].decode('utf-8', 'ignore')}-{hashlib.sha256(encoded).hexdigest()[:16]}"
