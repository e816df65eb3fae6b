"""Writes a page about the run when it ends."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from uae.report.run_page import write_run_page
from uae.trainer import is_dry_run


class Report(Callback):
    """Writes ``report.html`` in the folder of the run: before and after, pictures, curves, health, times and settings.

    The page is one file without scripts that opens without a network. It shows what other callbacks have left, so it stands behind
    them in the list: `callbacks.summary.Summary`, `callbacks.examples.Examples`, `callbacks.hacking.RewardHacking`, and the
    scalars of TensorBoard or `uae.loggers.CSV`. ``python -m uae.report RUN`` writes it for a run that has none.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory while all ranks are here: the answer is a broadcast."""
        self._folder = Path(trainer.log_dir) if trainer.log_dir and not is_dry_run(trainer) else None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Show what an interrupted run has."""
        if isinstance(exception, KeyboardInterrupt) and trainer.global_step:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._folder is None:
            return
        for logger in trainer.loggers:
            logger.save()
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.flush()
        try:
            write_run_page(self._folder)
        except Exception as error:  # whatever it is, the checkpoint of the last step must still be written
            rank_zero_warn(f"no report.html ({type(error).__name__}: {error}); python -m uae.report {self._folder} tries again")
