"""Arranges the scalars of a run for the first look, and notes its settings, so that runs can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from uae.report.charts import layout
from uae.report.run_page import HEADLINES
from uae.report.settings import HPARAMS_FIRST, Value, key_settings, read_config
from uae.trainer import current_metrics, is_dry_run


class Dashboard(Callback):
    """Writes, once per run, what TensorBoard's tabs CUSTOM SCALARS and HPARAMS show.

    CUSTOM SCALARS has a few named charts that answer: is it learning, is it healthy, where does the time go, what does it write?
    HPARAMS has a row per run, so that runs of one folder compare: the most important settings, from ``config.yaml``, and
    the latest values of the metrics that matter most (of all metrics of the validation, where it has none of these). Weights &
    Biases and MLflow get the settings, and compare by themselves.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._validated: set[str] = set()  # tags of validations
        self._training: set[str] = set()  # tags of training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory while all ranks are here: the answer is a broadcast."""
        self._folder = Path(trainer.log_dir) if trainer.log_dir and not is_dry_run(trainer) else None

    def state_dict(self) -> dict[str, Any]:
        """The tags of validations, for checkpoints: a resumed run has none before its first rollout."""
        return {"validated": sorted(self._validated)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the tags."""
        self._validated = set(state_dict["validated"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn the tags of validations; all are seen in the one before training, if there is one."""
        seen = set(current_metrics(trainer)) - self._validated
        self._validated |= seen
        if seen and self._training:
            self._write(trainer)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Write once the tags of training are known: after the update of the first rollout."""
        if not self._training and (batch_idx + 1) % getattr(pl_module, "batches_per_rollout", 1) == 0:
            self._training = {tag for tag in trainer.callback_metrics if tag not in self._validated}
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._folder is None:
            return
        settings = key_settings(read_config(self._folder))
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_custom_scalars(layout(sorted(self._training | self._validated)))
                _write_hparams(logger, settings, [tag for tag in HEADLINES if tag in self._validated] or sorted(self._validated))
            elif isinstance(logger, (WandbLogger, MLFlowLogger)):
                logger.log_hyperparams(settings)


def _write_hparams(logger: TensorBoardLogger, settings: dict[str, Value], metrics: list[str]) -> None:
    """Name settings and metrics for the tab HPARAMS, which takes the latest value of each metric from the scalars of the run.

    The tab first shows five settings: those that are marked as ``differs``, then the others, each in alphabetical order.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    experiment, *session = hparams(settings, dict.fromkeys(metrics, 0.0))
    plugin = experiment.value[0].metadata.plugin_data
    content = HParamsPluginData.FromString(plugin.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in HPARAMS_FIRST
    plugin.content = content.SerializeToString()
    files: Any = logger.experiment._get_file_writer()
    for summary in (experiment, *session):
        files.add_summary(summary)
