"""Shows where a run hangs, by the stack traces of all threads of every rank in the log directory."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import time
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from uae.trainer import is_dry_run


class Watchdog(Callback):
    """Writes stack traces to ``stacks/rank<R>.txt`` in the log directory if a step of the run takes longer than a limit.

    Watched are training steps with their rollouts, batches of validation, test and prediction, and the loading at the start.
    A timer starts again with every batch. Every rank has its own timer, in a thread that does not need the Python
    interpreter, so ranks that wait in a collective operation write their stacks too. If nothing takes too long, there is no
    file.

    Args:
        limit: Seconds after which stacks are written, above 0. Choose it above the time of the slowest step, its checkpoint
            included, and below the timeout of collective operations.
        fatal: Whether the process then ends with status 1, so that a scheduler can start the run again. Loading and exports
            are never ended.
    """

    def __init__(self, limit: float = 1200.0, fatal: bool = False) -> None:
        if not limit > 0:
            raise ValueError(f"callbacks.watchdog.Watchdog.limit={limit} seconds; allowed: above 0")
        self.limit, self.fatal = limit, fatal
        self.file: Path | None = None
        self._descriptor: int | None = None
        self._kept = self._header = 0  # bytes of stacks to keep, and of the header line after them

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open this rank's file and watch the loading. All ranks read the log directory, because it is broadcast."""
        log_dir = trainer.log_dir
        if log_dir is None or is_dry_run(trainer):
            return
        self.file = Path(log_dir, "stacks", f"rank{trainer.global_rank}.txt")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._kept, self._header = os.fstat(self._descriptor).st_size, 0  # a requeued run adds to its last stacks
        self._wind_up(trainer, "setting up", fatal=False)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch a training step, and what follows it until the next batch."""
        self._wind_up(trainer, f"training batch {batch_idx}", self.fatal)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Watch a batch without training."""
        stage = trainer.state.stage
        self._wind_up(trainer, f"{stage.value if stage else 'unknown'} batch {batch_idx}", self.fatal)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch what follows the last batch: metrics of all ranks, checkpoints."""
        self._wind_up(trainer, "after validation", self.fatal)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch summaries and exports."""
        self._wind_up(trainer, "after training", fatal=False)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop watching, because the run ends."""
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching, because the run has ended."""
        self._stop()

    def _wind_up(self, trainer: Trainer, what: str, fatal: bool) -> None:
        if self._descriptor is None:
            return
        self._keep_stacks()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        header = f"rank {trainer.global_rank}, step {trainer.global_step}, {what}, since {since}\n".encode()
        with contextlib.suppress(OSError):  # a full disk is no reason to stop
            os.ftruncate(self._descriptor, self._kept)
            self._header = os.write(self._descriptor, header)
        faulthandler.dump_traceback_later(self.limit, file=self._descriptor, exit=fatal)

    def _keep_stacks(self) -> None:
        """Stop the timer. If stacks were written since it started, keep them; else the next header replaces the last one."""
        faulthandler.cancel_dump_traceback_later()
        assert self._descriptor is not None
        size = os.fstat(self._descriptor).st_size
        if size > self._kept + self._header:
            self._kept, self._header = size, 0
            warnings.warn(f"no progress for {self.limit:g} s: the stacks of this rank are in {self.file}", stacklevel=2)

    def _stop(self) -> None:
        if self._descriptor is None or self.file is None:
            return
        self._keep_stacks()
        os.ftruncate(self._descriptor, self._kept)
        os.close(self._descriptor)
        self._descriptor = None
        if not self._kept:
            self.file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # another rank's stacks are in it
                self.file.parent.rmdir()
