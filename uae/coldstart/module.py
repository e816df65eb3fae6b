"""Supervised cold start: everything that is trained before the reward, by one LightningModule."""

from __future__ import annotations

import json
import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from uae.coldstart.objective import Objective
from uae.systems.tiny import WEIGHTS, checksums
from uae.types import ImageBatch


class ColdStart(L.LightningModule):
    """Minimises one objective and writes the trained modules at the end.

    Args:
        objective: What to minimise; see `uae.coldstart`.
        learning_rate: Peak, reached after ``warmup`` steps, then a cosine to zero at ``trainer.max_steps``.
        warmup: Steps.
        weight_decay: Of AdamW.
        folder: Where the weights go; the default is the package's own folder.
    """

    def __init__(
        self,
        objective: Objective,
        learning_rate: float = 1e-3,
        warmup: int = 100,
        weight_decay: float = 0.01,
        folder: str | None = None,
    ) -> None:
        super().__init__()
        self.objective = objective
        self.learning_rate, self.warmup, self.weight_decay = learning_rate, warmup, weight_decay
        self.folder = Path(folder) if folder else WEIGHTS
        self.batches_per_rollout = 1
        self._built = False

    def configure_model(self) -> None:
        """Build the objective's modules, once."""
        if not self._built:
            self.objective.build()
            self._built = True

    def on_fit_start(self) -> None:
        """A schedule needs an end."""
        if self.trainer.max_steps < 1:
            raise ValueError(
                f"trainer.max_steps={self.trainer.max_steps}; a cold start needs 1 or more: set trainer.max_steps"
            )

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """One step on the objective."""
        losses = self.objective(batch, self.global_step / self.trainer.max_steps)
        self.log_dict({f"{self.name}/{name}": value for name, value in losses.items()}, prog_bar=True)
        return losses["loss"]

    def validation_step(self, batch: ImageBatch, batch_idx: int) -> None:
        """The objective's own score of held-out images."""
        scores = {f"{self.name}/{name}": value for name, value in self.objective.score(batch).items()}
        self.log_dict(scores, batch_size=len(batch["image"]), sync_dist=True)

    test_step = validation_step

    @property
    def name(self) -> str:
        """The objective's name in tags: ``flow_matching`` and the like."""
        return type(self.objective).__module__.rsplit(".", 1)[-1]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with warm-up and cosine decay."""
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, self.learning_rate, betas=(0.9, 0.98), weight_decay=self.weight_decay)

        def scale(step: int) -> float:
            return min(1.0, (step + 1) / self.warmup) * (
                0.5 + 0.5 * math.cos(math.pi * min(1.0, step / self.trainer.max_steps))
            )

        scheduler = {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, scale), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}  # type: ignore[return-value]

    def on_fit_end(self) -> None:
        """Write the weights (averaged ones, where a callback averages) and their checksums."""
        if self.trainer.is_global_zero and not self.trainer.fast_dev_run:
            self.objective.eval().save(self.folder)
            (self.folder / "checksums.json").write_text(json.dumps(checksums(self.folder), indent=2) + "\n")
