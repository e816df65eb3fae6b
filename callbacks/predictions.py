"""Writes the captions and reconstructions of ``predict``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torchvision.transforms.functional import to_pil_image

from uae.files.lines import lines_of
from uae.files.whole import write_whole

ROWS = "captions.rank*.jsonl"


class Predictions(BasePredictionWriter):
    """Writes every reconstruction as a PNG named after its image, and all captions to ``captions.json``.

    Images are written atomically, and only then their row in ``captions.rank<rank>.jsonl``. So an image with a row is
    complete, whenever the run was killed.

    Args:
        folder: Folder that is written; None is ``predictions`` in the log directory.
        resume: Whether to keep the rows of earlier runs. The data module decides which images are still to be predicted.
    """

    def __init__(self, folder: str | None = None, resume: bool = False) -> None:
        super().__init__("batch")
        self.folder, self.resume = folder, resume
        self._rows: list[dict[str, Any]] = []
        self._path = self._file = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open this rank's files in a folder that all ranks agree on, and remove earlier rows unless the run is resumed.

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
        self._rows = []
        if trainer.is_global_zero and not self.resume:
            for file in self._path.glob(ROWS):
                file.unlink()
        trainer.strategy.barrier("old rows are gone")
        if _torn(self._file):
            with self._file.open("a") as out:
                out.write("\n")

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
            _save(prediction["reconstruction"][i], self._path / file)
            row = {"name": name, "id": int(batch["id"][i]), "caption": prediction["caption"][i], "reconstruction": file}
            rows.append(row | {key: float(value[i]) for key, value in rewards.items()})
        self._rows += rows
        with self._file.open("a", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

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
    """Write ``captions.json``: one row per finished image, ordered by name; ``rows`` go before those of earlier runs."""
    by_name = finished(folder) | {row["name"]: row for row in rows}
    ordered = [by_name[name] for name in sorted(by_name)]
    text = json.dumps(ordered, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / "captions.json", text.encode())
    return ordered


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


def _torn(file: Path) -> bool:
    """Whether the last line of a file lacks its line break."""
    return file.is_file() and not file.read_bytes().endswith(b"\n")


def _save(image_CHW: torch.Tensor, path: Path) -> None:
    content = BytesIO()
    to_pil_image(image_CHW.float().clamp(0, 1).cpu()).save(content, format="PNG")
    write_whole(path, content.getvalue())


def file_name(name: str) -> str:
    """A relative PNG path for an image's name; ``a.jpg`` and ``a.png`` do not collide and nothing leaves the folder.

    Names come from the data and cannot be trusted: absolute paths, ``..``, backslashes and overlong parts are replaced.
    """
    parts = [part for part in name.replace("\0", "").replace("\\", "/").split("/") if part not in ("", "..", ".")]
    file = "/".join(map(_part, parts)) or "image"
    return file if file.lower().endswith(".png") else f"{file}.png"


def _part(part: str) -> str:
    """A part of a path in at most 200 bytes. A cut part ends with a hash of the whole, so that names stay different."""
    encoded = part.encode("utf-8", "replace")
    if len(encoded) <= 200:
        return encoded.decode()
    return f"{encoded[:180].decode('utf-8', 'ignore')}-{hashlib.sha256(encoded).hexdigest()[:16]}"
