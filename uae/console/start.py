"""The callbacks that show a run, where the configuration has no others for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelSummary, ProgressBar

from uae.console.parts import Parts
from uae.console.progress import Progress


def with_console(trainer: Mapping[str, Any]) -> list[Callback]:
    """The callbacks of a run, led by `Progress` and `Parts` unless they are switched off or others of their kind are given.

    Args:
        trainer: The arguments of the trainer: ``callbacks``, ``enable_progress_bar`` and ``enable_model_summary``.
    """
    given = trainer.get("callbacks") or []
    given = given if isinstance(given, list) else [given]
    added: list[Callback] = []
    if trainer.get("enable_progress_bar") is not False and not any(isinstance(one, ProgressBar) for one in given):
        added.append(Progress())
    if trainer.get("enable_model_summary") is not False and not any(isinstance(one, ModelSummary) for one in given):
        added.append(Parts())
    return [*added, *given]
