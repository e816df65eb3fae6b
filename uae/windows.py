"""Accumulation windows, rollouts and epochs, which have to end together: the batches of an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed
from torchmetrics.utilities.distributed import gather_all_tensors

from uae.grpo import GRPOLoss, entropy_threshold
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


def counted(loss: GRPOLoss, mask_RS: Tensor, mini_batches: int) -> Tensor:
    """What a loss divides by, in every mini-batch: actions ``[M]``, or rows with actions where its `window` is "none".

    Args:
        loss: The loss.
        mask_RS: 1 where an action of a rollout counts, in the order of the mini-batches.
        mini_batches: M, number of mini-batches of equally many rows.
    """
    rows_MR = mask_RS.sum(1).view(mini_batches, -1)
    return rows_MR.sum(1) if loss.window != "none" else (rows_MR > 0).to(rows_MR).sum(1)


def threshold_of(loss: GRPOLoss, entropy_RS: Tensor | None, mask_RS: Tensor) -> Tensor | None:
    """The entropy that the tokens of ``loss.top_entropy`` reach, among those of a rollout on all ranks; None if the loss takes all.

    Args:
        loss: The loss.
        entropy_RS: Entropies of the rollout in nats; None if there are none, which the loss refuses itself.
        mask_RS: 1 where an action of the rollout counts.
    """
    if loss.top_entropy == 1 or entropy_RS is None:
        return None
    values = entropy_RS[mask_RS.bool()]
    if distributed.is_initialized():
        values = torch.cat(gather_all_tensors(values))  # ranks may have different numbers of tokens
    return entropy_threshold(values, torch.ones_like(values), loss.top_entropy)


def normalizer(trainer: Trainer, actions_M: Tensor, batch_idx: int, world: int) -> Tensor:
    """What was counted in the optimizer window, divided by the number of losses that Lightning and the ranks will average.

    Args:
        trainer: The trainer of the run.
        actions_M: What `counted` found, of all ranks that the loss spans.
        batch_idx: Number of the training batch in its epoch.
        world: Number of these ranks.
    """
    accumulate = trainer.accumulate_grad_batches
    start = batch_idx // accumulate * accumulate
    turns = [turn % len(actions_M) for turn in range(start, start + accumulate)]
    return actions_M[turns].sum() / (accumulate * world)


def check_windows(trainer: Trainer, per_rollout: int, losses: Iterable[GRPOLoss], rows_left_out: bool = False) -> None:
    """Refuse an accumulation that does not meet the end of rollouts.

    Args:
        trainer: The trainer of the run.
        per_rollout: Training batches that one rollout feeds.
        losses: The losses of the run. Some divide by the tokens of the whole window.
        rows_left_out: Whether rows may be left out, so that all losses divide by what is left in the whole window.

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
    if per_rollout % accumulate and rows_left_out:
        raise ValueError(
            "model.init_args.filtering leaves captions out of what the loss divides by, in the optimizer window, which spans "
            f"{accumulate // per_rollout} rollouts of which the later are unknown; set trainer.accumulate_grad_batches to a divisor "
            f"of {per_rollout} (and raise data.init_args.batch_size), or model.init_args.filtering.drop_flat_groups and "
            "model.init_args.filtering.drop_truncated to false"
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
