"""Shows what became of the same images: source, reconstruction before the training, reconstruction after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from uae.pictures import Drawn, draw_columns
from uae.trainer import is_dry_run
from uae.types import ImageBatch


class Examples(Callback):
    """Writes ``examples.png`` to the log directory: a row per image, with its greedy captions and what was drawn of them.

    The images are the first of the first validation batch, as validation captions and draws them. ``examples.pt`` beside it
    holds the same as tensors and strings. Checkpoints contain the reconstructions before the training, so a resumed run
    shows the original start.

    Args:
        images: Number of images to show.
    """

    def __init__(self, images: int = 6) -> None:
        if images < 1:
            raise ValueError(f"images={images} of callbacks.examples.Examples; allowed: 1 or more")
        self.images = images
        self.before: Drawn | None = None
        self.after: Drawn | None = None
        self._source = torch.empty(0)
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory while all ranks are here: the answer is a broadcast."""
        self._folder = Path(trainer.log_dir) if trainer.log_dir and not is_dry_run(trainer) else None

    def state_dict(self) -> dict[str, Any]:
        """What was drawn before the training, for checkpoints."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore it in a resumed run."""
        self.before = state_dict["before"]

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the first images of the first batch."""
        if batch_idx or dataloader_idx or not isinstance(outputs, dict) or "reconstruction" not in outputs:
            return
        self._source = _kept(batch["image"], self.images)
        self.after = {
            "reconstruction": _kept(outputs["reconstruction"], self.images),
            "caption": list(outputs["caption"][: self.images]),
        }
        if trainer.sanity_checking:
            self.before = self.after

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the picture."""
        if not trainer.is_global_zero or self._folder is None or self.after is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        shown = {"source": self._source, "before": self.before, "after": self.after}
        torch.save(shown, self._folder / "examples.pt")
        draw_columns(self._source, {"before": self.before, "after": self.after}).save(self._folder / "examples.png")


def _kept(images_BCHW: Tensor, count: int) -> Tensor:
    return images_BCHW[:count].detach().float().cpu().clone()
