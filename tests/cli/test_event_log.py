"""TensorBoard on a full disk: events are lost, the run is not."""

import errno
import os

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from uae.cli.event_log import EnduringTensorBoard
from uae.miniature.data import SceneData


class Disk:
    """Full while told so."""

    def __init__(self):
        self.full, self.write = False, RecordWriter.write

    def check(self, *args):
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(*args)


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(RecordWriter, "write", lambda *args: disk.check(*args))
    return disk


def write_all(logger, *steps):
    """As Lightning does at every step, and long enough for the thread to have tried."""
    for step in steps:
        logger.log_metrics({"loss": float(step)}, step)
        logger.experiment.add_text("panel", "x", step)
        logger.experiment.flush()


def steps_in(file):
    reader = EventAccumulator(str(file)).Reload()
    return [event.step for event in reader.Scalars("loss")] if "loss" in reader.Tags()["scalars"] else []


def test_events_are_lost_while_the_disk_is_full_and_no_others(tmp_path, disk):
    logger = EnduringTensorBoard(tmp_path, "", "", retry_seconds=0)
    write_all(logger, 0)
    disk.full = True
    with pytest.warns(UserWarning, match="TensorBoard cannot write.*No space left") as seen:
        write_all(logger, 1, 2, 3)
    assert len(seen) < 9  # not one per event
    disk.full = False
    write_all(logger, 4, 5)
    logger.finalize("success")
    found = [step for file in tmp_path.glob("events*") for step in steps_in(file)]
    assert sorted(found) == [0, 4, 5]


def test_a_run_outlives_its_logger(build, trainer, tmp_path, disk):
    def fit(logger):
        class Fill:
            def __call__(self, *args):
                disk.full = True

        module = build()
        module.on_train_batch_start = Fill()
        run = trainer(max_steps=4, logger=logger, log_every_n_steps=1)
        run.fit(module, SceneData(batch_size=2, train_size=64))
        return run.global_step

    with pytest.warns(UserWarning, match="training goes on"):
        assert fit(EnduringTensorBoard(tmp_path, "", "", flush_secs=0)) == 4
    disk.full = False
    with pytest.raises(OSError, match="No space left"):  # what it would be otherwise
        fit(TensorBoardLogger(tmp_path, "", "", flush_secs=0))


def test_hyper_parameters_that_cannot_be_written_are_a_warning(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    logger = EnduringTensorBoard(tmp_path, "", "")
    monkeypatch.setattr("lightning.pytorch.loggers.tensorboard.save_hparams_to_yaml", full)
    with pytest.warns(UserWarning, match="No space left"):
        logger.save()
