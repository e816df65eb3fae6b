"""A TensorBoard logger that continues the run when events cannot be written."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class EnduringTensorBoard(TensorBoardLogger):
    """Lightning's TensorBoardLogger, which also works while the disk is full.

    TensorBoard's writing thread ends at the first error, and every later call raises that error. This logger warns instead,
    drops events for a while, and then opens a new event file.

    Args:
        *args: Positional arguments of `lightning.pytorch.loggers.TensorBoardLogger`.
        retry_seconds: Seconds after a failure in which events are dropped.
        **kwargs: Keyword arguments of `lightning.pytorch.loggers.TensorBoardLogger`.
    """

    def __init__(self, *args: Any, retry_seconds: float = 60.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.retry_seconds = retry_seconds

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """TensorBoard's ``SummaryWriter``."""
        summary = super().experiment
        files = summary._get_file_writer()
        if not isinstance(files.event_writer, _EnduringWriter):
            files.event_writer = _EnduringWriter(files.event_writer, self.retry_seconds)
        return summary

    @rank_zero_only
    def save(self) -> None:
        """Write the hyper-parameters; warn if that fails."""
        _try(super().save)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write the remaining events; warn if that fails.

        After a success, Lightning calls `save` once the file is closed, which would open a second one. So it is saved here first, and
        Lightning gets another status.
        """
        if status == "success":
            self.save()
        _try(super().finalize, "closed")


class _EnduringWriter:
    """An ``EventFileWriter`` that is replaced after a failure."""

    def __init__(self, writer: Any, retry_seconds: float) -> None:
        self.writer, self.retry_seconds = writer, retry_seconds
        self.folder, self.make = writer.get_logdir(), type(writer)
        self.failed_at = 0.0

    def get_logdir(self) -> str:
        return self.folder

    def add_event(self, event: Any) -> None:
        self._do(lambda writer: writer.add_event(event))

    def flush(self) -> None:
        self._do(lambda writer: writer.flush())

    def close(self) -> None:
        self._do(lambda writer: writer.close())

    def _do(self, work: Callable[[Any], None]) -> None:
        if self.writer is None and time.monotonic() < self.failed_at + self.retry_seconds:
            return
        try:
            if self.writer is None:
                self.writer = self.make(self.folder)
            work(self.writer)
        except Exception as error:  # any error that ended TensorBoard's thread
            if self.writer is not None:
                _warn(error)
            self.writer, self.failed_at = None, time.monotonic()


def _try(work: Callable[..., None], *args: Any) -> None:
    try:
        work(*args)
    except OSError as error:
        _warn(error)


def _warn(error: Exception) -> None:
    warnings.warn(f"TensorBoard cannot write ({error}): training goes on, events are lost", stacklevel=3)
