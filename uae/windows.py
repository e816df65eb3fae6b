"""Accumulation windows, rollouts and epochs, which have to end together: the batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule, Trainer

from uae.grpo import GRPOLoss
from uae.trainer import is_dry_run, overfit_batches


def ends_epoch(trainer: Trainer) -> bool:
    """Whether the training batch in progress is the last of its epoch. Lightning takes an optimizer step after it."""
    ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return trainer.is_last_batch or ready == trainer.num_training_batches


def close_window(module: LightningModule) -> None:
    """Make the gradient of an accumulation window the mean over the batches that were in it. Call it after every backward pass.

    Lightning divides every loss by ``trainer.accumulate_grad_batches``, also in a window that the end of an epoch cuts short.
    Where data have no length, nobody knows beforehand that this will happen, so the gradient is corrected and not the loss.
    """
    trainer = module.trainer
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready % trainer.accumulate_grad_batches
    if not batches or not ends_epoch(trainer):
        return
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(trainer.accumulate_grad_batches / batches)


def check_windows(trainer: Trainer, per_rollout: int, losses: Iterable[GRPOLoss]) -> None:
    """Refuse an accumulation that does not meet the end of rollouts.

    Args:
        trainer: The trainer of the run.
        per_rollout: Training batches that one rollout feeds.
        losses: The losses of the run. Some divide by the tokens of the whole window.

    Raises:
        ValueError: Windows and rollouts end apart, or a window has tokens of rollouts that are still to come.
    """
    accumulate = trainer.accumulate_grad_batches
    if per_rollout % accumulate and accumulate % per_rollout:
        raise ValueError(
            f"trainer.accumulate_grad_batches={accumulate} and model.init_args.mini_batches * model.init_args.num_iterations="
            f"{per_rollout}: one must divide the other, so that rollouts and optimizer steps end together"
        )
    windowed = [loss.aggregation for loss in losses if loss.window != "none"]
    if per_rollout % accumulate and windowed:
        raise ValueError(
            f"model.init_args.loss.aggregation={windowed[0]} divides by the tokens of the optimizer window, which spans "
            f"{accumulate // per_rollout} rollouts of which the later are unknown; set trainer.accumulate_grad_batches "
            f"to a divisor of {per_rollout} (and raise data.init_args.batch_size), or use grpo or dr_grpo"
        )


def check_epoch(trainer: Trainer, per_rollout: int) -> None:
    """Refuse an epoch that would end inside a rollout, unless it is a dry run of which nothing is kept.

    Raises:
        ValueError: The number of training batches is known, and no multiple of ``per_rollout``.
    """
    batches = trainer.num_training_batches
    if batches != float("inf") and batches % per_rollout and not is_dry_run(trainer):
        key = "overfit_batches" if overfit_batches(trainer) else "limit_train_batches"
        raise ValueError(
            f"an epoch of {batches} training batches ends inside a rollout; allowed: a multiple of model.init_args.mini_batches "
            f"* model.init_args.num_iterations={per_rollout}: set trainer.{key}={max(batches // per_rollout, 1) * per_rollout}"
        )
