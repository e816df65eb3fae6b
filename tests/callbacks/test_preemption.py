"""Requests to end, at every moment of a run."""

import os
import signal

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment

from callbacks.checkpoint import RolloutCheckpoint
from callbacks.export import Export
from callbacks.preemption import SIGNALS, Preemption
from tests.two_processes import run_on_two
from uae.checkpoints.files import CheckpointFiles, read
from uae.miniature.data import SceneData


class Scheduler(Callback):
    """Sends a signal at one moment: a hook, and the optimizer step it must be at."""

    def __init__(self, hook, step=0, number=signal.SIGTERM, times=1):
        self.step, self.number, self.times, self.validated = step, number, times, []
        setattr(self, hook, self.send)

    def send(self, trainer, *_, **__):
        if trainer.global_step == self.step and self.times:
            self.times -= 1
            os.kill(os.getpid(), self.number)

    def on_validation_end(self, trainer, module):
        self.validated.append(-1 if trainer.sanity_checking else trainer.global_step)


@pytest.fixture(autouse=True)
def handlers():
    """The signals' handlers before the test, given back after it."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def fit(build, trainer, tmp_path):
    def run(*callbacks, **options):
        settings = {"max_steps": 20, "logger": CSVLogger(tmp_path, "", ""), "limit_val_batches": 1, **options}
        fitted = trainer(
            callbacks=[*callbacks, Preemption(), Export()],
            val_check_interval=6, check_val_every_n_epoch=None, plugins=[CheckpointFiles(), *options.pop("plugins", [])],
            **{name: value for name, value in settings.items() if name != "plugins"},
        )  # fmt: skip
        fitted.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=64, val_size=2))
        return fitted.global_step

    return run


MOMENTS = [
    ("in a step", ("on_train_batch_start", 3), 4),
    ("by SIGUSR1", ("on_train_batch_start", 3, signal.SIGUSR1), 4),
    ("again and again", ("on_train_batch_end", 3, signal.SIGTERM, 5), 4),
    ("in a validation", ("on_validation_batch_start", 6), 6),
    ("before the first step", ("on_sanity_check_start", 0), 2),
    ("while it loads", ("on_fit_start", 0), 2),
    ("while it ends", ("on_train_end", 4), 4),
]


@pytest.mark.parametrize(("moment", "stop"), [moment[1:] for moment in MOMENTS], ids=[m[0] for m in MOMENTS])
def test_a_request_ends_the_run_at_the_next_rollout(fit, tmp_path, moment, stop):
    scheduler = Scheduler(*moment)
    early = [Scheduler("on_train_batch_start", 3)] if moment[0] == "on_train_end" else []
    assert fit(scheduler, *early) == stop
    assert read(tmp_path / "checkpoints/preempted.ckpt")["global_step"] == stop
    assert scheduler.validated == [-1, 6] if stop == 6 else [-1]  # none for the end
    assert not (tmp_path / "export").exists()
    os.kill(os.getpid(), signal.SIGTERM)  # on the way out: still no death


def test_a_run_nobody_stopped_hands_the_signals_back(fit, handlers, tmp_path):
    assert fit(max_steps=2) == 2
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers
    assert (tmp_path / "export").exists()

    class Fault(Callback):
        def on_train_batch_end(self, *_):
            raise KeyError

    with pytest.raises(KeyError):
        fit(Fault())
    assert {number: signal.getsignal(number) for number in SIGNALS} == handlers


def test_a_run_that_has_taken_its_last_step_ends_as_if_nobody_had_asked(fit, tmp_path):
    """Stopped there, it would have no step left when it goes on, and never be exported."""
    scheduler = Scheduler("on_train_batch_start", 3)
    assert fit(scheduler, max_steps=4) == 4
    assert (tmp_path / "export").exists()
    assert not (tmp_path / "checkpoints/preempted.ckpt").exists()


def test_slurm_does_not_save_in_a_handler(fit, tmp_path, monkeypatch):
    """Lightning's own handler would save where it stands, call scontrol, and train on."""
    for name in ("SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
        monkeypatch.setenv(name, "1" if name in ("SLURM_JOB_ID", "SLURM_NTASKS") else "0")
    monkeypatch.setattr(SLURMEnvironment, "_validate_srun_used", staticmethod(lambda: None))
    for number in SIGNALS:
        cluster = SLURMEnvironment(auto_requeue=True, requeue_signal=signal.SIGUSR1)
        assert fit(Scheduler("on_train_batch_start", 3, number), plugins=[cluster]) == 4
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["preempted.ckpt"]


def one_is_asked(rank, build_module, folder):
    """Only the second process hears the request; a full disk then costs the checkpoint."""
    from tests.strategy.test_strategy import trainer

    results = []
    for strategy in ("ddp", "fsdp2"):
        scheduler = Scheduler("on_train_batch_start", 1, times=rank)
        callbacks = [scheduler, Preemption(), RolloutCheckpoint(20, dirpath=f"{folder}/{strategy}")]
        run = trainer(strategy, folder, max_steps=20, callbacks=callbacks, enable_checkpointing=True)
        run.strategy.checkpoint_io = CheckpointFiles()
        run.fit(build_module(), SceneData(batch_size=2, train_size=16))
        results.append(run.global_step)
    return results


@pytest.mark.slow
def test_all_ranks_stop_when_one_is_asked(tmp_path):
    from tests.strategy.test_strategy import module

    assert run_on_two(one_is_asked, module, str(tmp_path), timeout=200) == [[2, 2]] * 2
    assert read(tmp_path / "ddp/preempted.ckpt")["global_step"] == 2
    assert torch.load(tmp_path / "fsdp2/preempted.ckpt/meta.pt", weights_only=True)["global_step"] == 2
