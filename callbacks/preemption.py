"""Saves and stops a run when the scheduler needs the machine."""

from __future__ import annotations

import signal
import threading
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus

from callbacks.checkpoint import NotSavedError, save
from uae.trainer import at_last_step, note_preempted

SIGNALS = (signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
NAME = "preempted.ckpt"


class Preemption(Callback):
    """On SIGTERM or SIGUSR1, finishes the rollout, saves ``preempted.ckpt`` beside the other checkpoints and stops.

    The signal handler only remembers the request. At the end of the next rollout all ranks agree whether one of them got a
    request. A request during a validation or before the first step waits until then. The process ends with status 0,
    without a last validation or an export, and ``--ckpt_path last`` continues the run. Further signals have no effect. A run
    that has taken its last step is not stopped: saved there, it would have no step left, and never be exported.

    Lightning's own handlers are replaced, because they run collective operations inside the signal handler (on SLURM to save
    and requeue), and then several processes can wait for each other without end.
    """

    def __init__(self) -> None:
        self.asked = False
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Install the signal handlers before the model is loaded."""
        if stage != "fit" or threading.current_thread() is not threading.main_thread():
            return
        self.asked = False
        self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}
        connector: Any = trainer._signal_connector  # registers these two after the model is loaded
        connector._sigterm_notifier_fn = connector._slurm_sigusr_handler_fn = self._ask

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop at the end of a rollout if a rank got a request."""
        self._vote(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if a rank got a request during the validation; before the first step there is nothing to save."""
        if not trainer.sanity_checking and trainer.state.fn == TrainerFn.FITTING:
            self._vote(trainer, pl_module)

    def _vote(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and stop at the end of a rollout, all ranks together."""
        if trainer.interrupted or at_last_step(trainer) or not getattr(pl_module, "at_rollout_boundary", True):
            return
        if not trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            return
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or Path(trainer.log_dir or ".", "checkpoints")
        try:
            save(trainer, Path(folder, NAME))
        except NotSavedError as error:
            warnings.warn(f"{error}; stopping, earlier checkpoints are kept", stacklevel=2)
        trainer.should_stop = True
        trainer.limit_val_batches = 0  # Lightning would validate once more; the machine may be gone by then
        trainer.state.status = TrainerStatus.INTERRUPTED
        note_preempted(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell whoever goes on after this run that a rank got a request that came too late to stop the run."""
        if trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            note_preempted(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the earlier signal handlers, also in the record from which Lightning restores them later."""
        trainer._signal_connector._original_handlers.update(self._handlers)
        self._restore()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the earlier signal handlers, unless a request came: another signal would then kill the process."""
        if not self.asked:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _ask(self, *_: Any) -> None:
        self.asked = True
