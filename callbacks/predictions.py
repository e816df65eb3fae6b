"""What ``predict`` leaves behind."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter
from torchvision.transforms.functional import to_pil_image


class Predictions(BasePredictionWriter):
    """Writes every reconstruction as a PNG named after its image, and all captions to ``captions.json``.

    Args:
        folder: Where to; the default is ``predictions`` in the log directory.
    """

    def __init__(self, folder: str | None = None) -> None:
        super().__init__("batch")
        self.folder = folder
        self._rows: list[dict[str, Any]] = []
        self._path = Path()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh, in a folder all ranks agree on."""
        log_dir = trainer.log_dir
        if self.folder is None and log_dir is None:
            raise ValueError("callbacks.predictions.Predictions does not know where to write: set its folder")
        self._path = Path(self.folder) if self.folder else Path(str(log_dir), "predictions")
        self._rows = []

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
        """Write the images of one batch; every rank writes its own."""
        rewards = {name: value for name, value in prediction.items() if name.startswith("reward")}
        for i, name in enumerate(batch["name"]):
            file = file_name(name)
            (self._path / file).parent.mkdir(parents=True, exist_ok=True)
            to_pil_image(prediction["reconstruction"][i].float().clamp(0, 1).cpu()).save(self._path / file)
            row = {"name": name, "id": int(batch["id"][i]), "caption": prediction["caption"][i], "reconstruction": file}
            self._rows.append(row | {key: float(value[i]) for key, value in rewards.items()})

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the captions of all ranks, each image once, ordered by name."""
        parts = [self._rows]
        if torch.distributed.is_initialized():
            parts = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(parts, self._rows)
        rows = {row["id"]: row for part in parts for row in part}
        if trainer.is_global_zero:
            self._path.mkdir(parents=True, exist_ok=True)
            ordered = sorted(rows.values(), key=lambda row: row["name"])
            (self._path / "captions.json").write_text(json.dumps(ordered, indent=2, ensure_ascii=False) + "\n")
            print(f"{len(ordered)} captions and reconstructions in {self._path}")


def file_name(name: str) -> str:
    """A relative PNG path for an image's name; ``a.jpg`` and ``a.png`` do not collide and nothing leaves the folder."""
    parts = [part for part in Path(name).parts if part not in ("/", "..", ".")]
    file = str(Path(*parts))
    return file if file.lower().endswith(".png") else f"{file}.png"
