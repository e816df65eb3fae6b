"""Lightning's loggers for CSV files, Weights & Biases and MLflow, with the name and the folder that a run gets at its start.

Lightning's own need both in the configuration, where nobody knows yet which folder is free. They open nothing until something is
logged, so they can be made again before.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, runtime_checkable

from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, WandbLogger

CSV_FOLDER = "csv"  # below the folder of the run; every start of the run adds version_<n>/metrics.csv there


@runtime_checkable
class FollowsRun(Protocol):
    """A logger that the command line tells where the run writes, before anything is logged."""

    def follow(self, folder: Path, labels: str) -> None:
        """Write to the folder of a run from now on.

        Args:
            folder: The folder of the run, as ``outputs/tiny-2``.
            labels: What makes the run different from others of its name, as ``full``; may be empty.
        """
        ...


class CSV(CSVLogger):
    """Writes all scalars to ``csv/version_0/metrics.csv`` in the folder of the run, a row per step. Pictures are left out.

    A run that goes on in its folder writes to ``version_1`` and so on. ``report.html`` reads all of them.

    Args:
        every: Number of rows that are written to the disk together.
    """

    def __init__(self, every: int = 10) -> None:
        if every < 1:
            raise ValueError(f"trainer.logger.init_args.every={every}; allowed: 1 or more")
        self.every = every
        self.follow(Path(), "")

    def follow(self, folder: Path, labels: str) -> None:
        """See `FollowsRun`."""
        super().__init__(folder, name=CSV_FOLDER, flush_logs_every_n_steps=self.every)


class WeightsAndBiases(WandbLogger):
    """Logs scalars, panels, tables of captions and histograms to Weights & Biases; the run has the name of its folder.

    A run that goes on in its folder goes on at Weights & Biases, too.

    Args:
        project: Name of the project.
        entity: User or team; null is your default.
        offline: Keep everything in the folder of the run; ``wandb sync`` sends it later.
        tags: Words to find the run by.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str = "uae", entity: str | None = None, offline: bool = False, tags: Sequence[str] = ()) -> None:
        _check_installed("wandb", "Weights & Biases")
        self.project, self.entity, self.offline, self.tags = project, entity, offline, list(tags)
        self.follow(Path(), "")

    def follow(self, folder: Path, labels: str) -> None:
        """See `FollowsRun`."""
        record = folder / "run.json"  # differs between runs, and stays when one goes on
        known = f"{folder.resolve()} {record.read_text()}" if record.is_file() else None
        run_id = None if known is None else hashlib.sha256(known.encode()).hexdigest()[:16]
        super().__init__(
            name="/".join(filter(None, [folder.name, labels])), save_dir=folder, id=run_id, project=self.project, offline=self.offline,
            entity=self.entity, tags=self.tags,
        )  # fmt: skip


class MLFlow(MLFlowLogger):
    """Logs scalars, panels and tables of captions to MLflow; the run has the name of its folder.

    A run that goes on in its folder is a new run of the same name at MLflow.

    Args:
        experiment: Name of the experiment.
        tracking_uri: Address of the server; null is the environment variable ``MLFLOW_TRACKING_URI``, and without that the folder
            ``mlruns`` beside the folder of the run.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, experiment: str = "uae", tracking_uri: str | None = None) -> None:
        _check_installed("mlflow", "MLflow")
        self.experiment_name, self.address = experiment, tracking_uri
        self.follow(Path(), "")

    def follow(self, folder: Path, labels: str) -> None:
        """See `FollowsRun`."""
        name = "/".join(filter(None, [folder.name, labels]))
        address = self.address or os.environ.get("MLFLOW_TRACKING_URI")
        super().__init__(self.experiment_name, name, address, save_dir=str(folder.resolve().parent / "mlruns"))


def _check_installed(package: str, what: str) -> None:
    if find_spec(package) is None:
        raise ImportError(f"{what} in trainer.logger needs a package that is not installed: pip install {package}")
