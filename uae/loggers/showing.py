"""Pictures, tables and histograms in all loggers of a run that can hold them. Only the first process may call these."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

Cell = str | float
LINE_WIDTH = 70  # characters of a line in a cell


def can_show(trainer: Trainer) -> bool:
    """Whether any logger of a run holds pictures and tables."""
    return any(isinstance(logger, (TensorBoardLogger, WandbLogger, MLFlowLogger)) for logger in trainer.loggers)


def show_picture(loggers: Sequence[Logger], tag: str, picture: Image.Image, step: int) -> None:
    """Log a picture."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, pil_to_tensor(picture), step)
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [picture], step)
        elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
            logger.experiment.log_image(logger.run_id, picture, artifact_file=f"{tag}/step-{step:06d}.png")


def show_table(loggers: Sequence[Logger], tag: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
    """Log a table.

    Args:
        loggers: The loggers of the run.
        tag: Its name.
        head: Titles of the columns.
        rows: As many cells each as there are titles.
        step: Optimizer steps so far.
    """
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text(tag, markdown(head, rows), step)
        elif isinstance(logger, WandbLogger):
            logger.log_table(tag, list(head), [list(row) for row in rows], step=step)
        elif isinstance(logger, MLFlowLogger) and logger.run_id is not None:
            columns = {title: [row[place] for row in rows] for place, title in enumerate(head)}
            logger.experiment.log_table(logger.run_id, columns, artifact_file=f"{tag}/step-{step:06d}.json")


def show_histogram(loggers: Sequence[Logger], tag: str, values: Tensor, step: int) -> None:
    """Log the distribution of some values; MLflow has no histograms."""
    for logger in loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_histogram(tag, values, step)
        elif isinstance(logger, WandbLogger):
            wandb: Any = import_module("wandb")  # is installed, as its logger exists
            logger.experiment.log({tag: wandb.Histogram(values.numpy()), "trainer/global_step": step})


def markdown(head: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table for TensorBoard. Bars and line breaks are escaped so that no text can break it.

    Texts are set in lines of `LINE_WIDTH` characters: beside a longer one, TensorBoard breaks the words of the other columns.
    """
    lines = [head, ["---"] * len(head), *([_safe(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _safe(cell: Cell) -> str:
    if isinstance(cell, float):
        return f"{cell:.3f}"
    lines = textwrap.wrap(" ".join(cell.split()), LINE_WIDTH)
    return "<br>".join(line.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for line in lines)
