"""A polite end when the scheduler wants the machine back."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class Preemption(Callback):
    """On SIGTERM, finishes the rollout, saves ``checkpoints/preempted.ckpt`` in the log directory and stops.

    Lightning's own handler runs collectives inside the signal handler, which can hang several processes for good.
    """

    def __init__(self) -> None:
        self.asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the handler, after Lightning has set its own."""
        signal.signal(signal.SIGTERM, self._ask)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop at the end of a rollout, all ranks together."""
        if not getattr(pl_module, "at_rollout_boundary", True):
            return
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            log_dir = trainer.log_dir
            if log_dir is not None:
                trainer.save_checkpoint(Path(log_dir, "checkpoints", "preempted.ckpt"))
            trainer.should_stop = True

    def _ask(self, *_: Any) -> None:
        self.asked = True
