"""Shows the same validation images before and after the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from uae.files import examples
from uae.trainer import is_dry_run


class Examples(Callback):
    """Writes ``examples.png``, with a row per image: the source, and its reconstruction before and after, above the caption.

    Captions are those of the validation, greedy unless ``model.init_args.validation_temperature`` is above 0. Checkpoints
    contain the images before, so a resumed run compares with the original start. ``examples.pt`` holds the same as tensors.

    Args:
        images: Number of images, the first ones of the validation.
    """

    def __init__(self, images: int = 6) -> None:
        if images < 1:
            raise ValueError(f"images={images} of callbacks.examples.Examples; allowed: 1 or more")
        self.images = images
        self.before, self.after, self._seen = examples.none(), examples.none(), examples.none()
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory while all ranks are here: the answer is a broadcast."""
        self._folder = Path(trainer.log_dir) if trainer.log_dir and not is_dry_run(trainer) else None

    def state_dict(self) -> dict[str, Any]:
        """The start of the run, for checkpoints."""
        return {"before": self.before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the start of a resumed run."""
        self.before = state_dict["before"]

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the validation before."""
        self._seen = examples.none()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the first images of this process."""
        if not isinstance(outputs, dict) or "reconstruction" not in outputs:  # of a module that draws nothing
            return
        seen, missing = self._seen, self.images - len(self._seen["caption"])
        seen["source"] += [examples.small(image) for image in outputs["image"][:missing]]
        seen["reconstruction"] += [examples.small(image) for image in outputs["reconstruction"][:missing]]
        seen["caption"] += outputs["caption"][:missing]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first validation is the start."""
        if trainer.sanity_checking:
            self.before = self._seen
        else:
            self.after = self._seen

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and draw."""
        if not trainer.is_global_zero or self._folder is None or trainer.interrupted or not self.after["caption"]:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        examples.save(self._folder / "examples.pt", self.before, self.after)
        examples.comparison({"before": self.before, "after": self.after}).save(self._folder / "examples.png")
