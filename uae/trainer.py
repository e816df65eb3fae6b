"""What a Lightning Trainer has but does not declare: attributes that its ``__init__`` sets from another file."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from lightning.pytorch import LightningDataModule, Trainer


def is_dry_run(trainer: Trainer) -> bool:
    """Whether ``trainer.fast_dev_run`` is on: a few batches, of which nothing is kept."""
    return bool(_of(trainer).fast_dev_run)


def at_last_step(trainer: Trainer) -> bool:
    """Whether the batch that has just been used is the last one of the run, by ``max_steps`` or ``max_epochs``."""
    last_epoch = trainer.current_epoch + 1 == trainer.max_epochs
    return 0 < trainer.max_steps <= trainer.global_step or (trainer.is_last_batch and last_epoch)


def note_preempted(trainer: Trainer) -> None:
    """Remember that a run was asked to stop. ``trainer.interrupted`` is forgotten when ``fit`` returns."""
    _of(trainer).preempted = True


def was_preempted(trainer: Trainer) -> bool:
    """Whether `note_preempted` was called for a run."""
    return "preempted" in vars(trainer)


def overfit_batches(trainer: Trainer) -> float:
    """``trainer.overfit_batches``: a share or a number of training batches to repeat, 0 for none."""
    return float(_of(trainer).overfit_batches)


def data_module(trainer: Trainer) -> LightningDataModule | None:
    """The data module of the run, or None where plain loaders were given."""
    found: LightningDataModule | None = _of(trainer).datamodule
    return found


def batch_size(trainer: Trainer) -> int | None:
    """Images per training batch and process, or None where the data module, which may be anybody's, does not tell."""
    found: int | None = getattr(data_module(trainer), "batch_size", None)
    return found


def current_metrics(trainer: Trainer) -> Collection[str]:
    """Names of the metrics that the loop that runs now (training or validation) has logged, without those of the other loop."""
    found: dict[str, Any] = _of(trainer)._logger_connector.metrics["callback"]
    return found


def check_precision(trainer: Trainer) -> None:
    """Refuse precisions that convert what must stay in float32: the weights that train, and the images.

    Raises:
        ValueError: ``trainer.precision`` is one of these.
    """
    if trainer.precision in ("16-true", "bf16-true", "64-true"):
        raise ValueError(
            f"trainer.precision={trainer.precision} converts images and weights that train, which must stay in float32 (16 bits round "
            "updates of 1e-5 away); allowed: 32-true, bf16-mixed, 16-mixed. Frozen weights are in bfloat16 with "
            "model.init_args.system.init_args.reading.dtype=bfloat16, whatever trainer.precision is"
        )


def _of(trainer: Any) -> Any:
    return trainer
