"""Checkpoints that resume exactly."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class RolloutCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, held back until a rollout has been used up.

    A rollout is not part of a checkpoint, so one taken in its middle could not continue with the same captions.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints; a multiple of the steps that one rollout feeds
            (``mini_batches * num_iterations / accumulate_grad_batches``).
        **kwargs: Of `lightning.pytorch.callbacks.ModelCheckpoint`.
    """

    def __init__(self, every_n_train_steps: int | None = None, **kwargs: Any) -> None:
        super().__init__(every_n_train_steps=every_n_train_steps, **kwargs)
        self.interval = every_n_train_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse an interval that never meets the end of a rollout."""
        super().setup(trainer, pl_module, stage)
        batches = getattr(pl_module, "batches_per_rollout", 1)
        if self.interval and self.interval * trainer.accumulate_grad_batches % batches:
            steps = batches / trainer.accumulate_grad_batches
            raise ValueError(
                f"every_n_train_steps={self.interval} of callbacks.checkpoint.RolloutCheckpoint; allowed: multiples of "
                f"{steps:g}, the optimizer steps of one rollout (model.init_args.mini_batches * num_iterations / "
                "trainer.accumulate_grad_batches)"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if it is time, at the end of a rollout."""
        if getattr(pl_module, "at_rollout_boundary", True):
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with fresh metrics, at the end of a rollout."""
        if trainer.sanity_checking or getattr(pl_module, "at_rollout_boundary", True):
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``last.ckpt`` if there is none yet."""
        if getattr(pl_module, "at_rollout_boundary", True):
            super().on_train_end(trainer, pl_module)
