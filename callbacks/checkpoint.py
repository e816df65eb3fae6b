"""Checkpoints from which a run continues exactly as if it had not been stopped."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import proxy

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from uae.checkpoints.files import newest, partial_of, publish, remove, tidy
from uae.trainer import at_last_step, current_metrics, is_dry_run


class NotSavedError(Exception):
    """A checkpoint could not be written. All ranks raise it together."""


def save(trainer: Trainer, path: str | Path, weights_only: bool = False) -> None:
    """Save a checkpoint, or raise on all ranks. Collective.

    Raises:
        NotSavedError: A rank could not write its part: the disk is full, a quota reached, the folder gone.
    """
    error = None
    try:
        trainer.save_checkpoint(path, weights_only)
    except OSError as failure:
        error = failure
        trainer.strategy.barrier("Trainer.save_checkpoint")  # ranks without an error wait at this barrier
    if trainer.strategy.reduce_boolean_decision(error is not None, all=False):
        raise NotSavedError(str(error or f"another process could not write checkpoint {str(path)!r}")) from error


class RolloutCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, which saves only when a rollout has been used up.

    A checkpoint does not contain the rollout. So a run could not continue exactly from the middle of one.

    The last step of a run is always saved, also between two intervals and inside a rollout, and after everything else that
    ends a run (summary, export): a run that is killed before has a step left, and ends again. ``ckpt_path: last`` is the
    furthest checkpoint of the run's folder that can be loaded, also one written at a preemption. A checkpoint that cannot be
    written (disk full) is a warning: the run goes on and keeps the ones it has.

    A checkpoint that is ranked by a metric of the validation (``monitor``) waits for the next validation, so that the metric
    is the one of its own step. Meanwhile ``last.ckpt`` is written at every interval.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints; a multiple of the steps that one rollout feeds
            (``mini_batches * num_iterations / accumulate_grad_batches``).
        max_failures: The run stops when so many checkpoints in a row could not be written.
        **kwargs: Further arguments of `lightning.pytorch.callbacks.ModelCheckpoint`.
    """

    def __init__(self, every_n_train_steps: int | None = None, max_failures: int = 3, **kwargs: Any) -> None:
        super().__init__(every_n_train_steps=every_n_train_steps, **kwargs)
        self.interval, self.max_failures = every_n_train_steps, max_failures
        self.failures = 0  # in a row; the same on all ranks
        self._failed_at = -1  # the step of the last one
        self._written_at = -1  # the step of the newest checkpoint, by whatever name
        self._position: dict[str, Any] = {}  # of the run's last step: Lightning counts on until it ends
        self._ranked: dict[str, Any] | None = None  # what the checkpoint of the last step will be ranked by
        self._ending = False  # whether everything else has ended, so that the last step can be saved

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

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove incomplete checkpoints of killed processes. The checkpoint to resume from has been read before."""
        super().on_train_start(trainer, pl_module)
        self._written_at = trainer.global_step  # the checkpoint that the run is resumed from
        self._position, self._ranked, self._ending = {}, None, False
        if trainer.is_global_zero:
            assert self.dirpath is not None
            tidy(Path(self.dirpath))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save at the end of a rollout if a checkpoint is due, by the interval or at the end of an epoch or of the run."""
        if at_last_step(trainer):
            connector: Any = trainer._checkpoint_connector
            self._position = copy.deepcopy({"loops": connector._get_loops_state_dict(), "epoch": trainer.current_epoch})
        if not getattr(pl_module, "at_rollout_boundary", True):
            return
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        due = self.interval and trainer.global_step % self.interval == 0 and self.save_last
        if due and self._defer_save_until_validation and self._written_at != trainer.global_step:
            self._write_last(trainer, self._monitor_candidates(trainer))
        if self.every_n_epochs and (trainer.is_last_batch or self._position):
            super().on_train_epoch_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing. Resumed from a checkpoint of this hook, Lightning would use the image order of another epoch."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save with fresh metrics, at the end of a rollout."""
        wanted = self.every_n_epochs or self._defer_save_until_validation
        if trainer.sanity_checking or (wanted and getattr(pl_module, "at_rollout_boundary", True)):
            if self._defer_save_until_validation and self._last_global_step_saved == trainer.global_step:
                self._last_global_step_saved = -1  # the step has only its ``last.ckpt`` yet
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step. The callbacks that come before this one have done their part."""
        if is_dry_run(trainer) or trainer.interrupted or not (self.save_top_k or self.save_last):
            return
        self._ending = True
        candidates = self._ranked or self._monitor_candidates(trainer)
        if self._ranked:
            self._save_topk_checkpoint(trainer, candidates)
        if self.monitor is None and trainer.global_step not in (self._written_at, self._failed_at):
            self._save_topk_checkpoint(trainer, candidates)
        if trainer.global_step not in (self._written_at, self._failed_at):
            self._write_last(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the last step as it was when it was taken. Continued at a later position, a run would begin another epoch."""
        checkpoint |= self._position

    # ------------------------------------------------------------------------------------------- what Lightning calls

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        """Candidates for ``ckpt_path: last``: checkpoints of the run's own folder or, in an evaluation, of the folder of ``fit``."""
        lightning: Any = self
        folders = [lightning._ModelCheckpoint__resolve_ckpt_dir(trainer)]
        if self.dirpath is None:
            folders.append(Path(trainer.default_root_dir, "checkpoints"))
        for folder in map(Path, folders):
            found = newest(folder)
            if found is not None:
                return {str(found)}
        if trainer.state.fn != TrainerFn.FITTING:  # a fit starts anew, so that one command starts and continues a run
            raise FileNotFoundError(f"no checkpoint in {str(folder)!r}: correct run_name or ckpt_path")
        return set()

    def _save_topk_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        ranked = self._ending or not trainer.training or self.monitor in current_metrics(trainer)
        if self.monitor in monitor_candidates and not ranked:
            self._defer_save_until_validation = True  # the value is that of an earlier step
        elif self._waits():
            self._ranked = monitor_candidates
        else:
            self._write_ranked(trainer, monitor_candidates)

    def _waits(self) -> bool:
        """Whether this is the last step, which is saved when everything else has ended."""
        return bool(self._position) and not self._ending

    def _write_ranked(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        with self._surviving(trainer):
            super()._save_topk_checkpoint(trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if not self.save_last or self._failed_at == trainer.global_step or self._waits():
            return
        if self.save_last == "link" and self._written_at != trainer.global_step:  # nothing to link to
            self._write_last(trainer, monitor_candidates)
            return
        with self._surviving(trainer):
            super()._save_last_checkpoint(trainer, monitor_candidates)

    def _write_last(self, trainer: Trainer, monitor_candidates: dict[str, Any]) -> None:
        if self._waits():
            return
        with self._surviving(trainer):
            self.last_model_path = self.format_checkpoint_name(monitor_candidates, self.CHECKPOINT_NAME_LAST)
            self._save_checkpoint(trainer, self.last_model_path)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        save(trainer, filepath, self.save_weights_only)
        self._last_global_step_saved, self._last_checkpoint_saved = trainer.global_step, filepath
        self._written_at = trainer.global_step
        self.failures = 0
        for logger in trainer.loggers if trainer.is_global_zero else ():
            logger.after_save_checkpoint(proxy(self))

    @contextmanager
    def _surviving(self, trainer: Trainer) -> Iterator[None]:
        """Inside, a failed write becomes a warning, and the record of earlier checkpoints is restored."""
        names = [*self.state_dict(), "_last_global_step_saved", "_last_checkpoint_saved", "_written_at"]
        before = {name: getattr(self, name) for name in names} | {"best_k_models": dict(self.best_k_models)}
        try:
            yield
        except NotSavedError as error:
            vars(self).update(before)
            self.failures, self._failed_at = self.failures + 1, trainer.global_step
            if self.failures >= self.max_failures:
                raise RuntimeError(
                    f"{self.failures} checkpoints in a row could not be written, the last: {error}; earlier ones are kept: "
                    "make room and continue with --ckpt_path last"
                ) from error
            warnings.warn(f"{error}; training goes on, earlier checkpoints are kept", stacklevel=2)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Replace the link ``last.ckpt`` by one to the newest checkpoint, atomically."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            link = Path(linkpath)
            try:
                remove(partial_of(link))
                os.symlink(os.path.relpath(filepath, link.parent), partial_of(link))
                publish(partial_of(link), link)
            except OSError as error:  # a run can continue without the link
                warnings.warn(f"{linkpath!r} cannot be linked to {filepath!r}: {error.strerror}", stacklevel=2)
        trainer.strategy.barrier()
