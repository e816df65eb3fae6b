from datetime import timedelta

import pytest
import torch

from callbacks.checkpoint import RolloutCheckpoint
from callbacks.preemption import Preemption
from uae.data import SceneData


def saved_steps(folder):
    return sorted(torch.load(file, weights_only=False)["global_step"] for file in folder.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("triggers", "steps"),
    [
        ({"train_time_interval": timedelta(0)}, [2, 4]),  # wants every step
        ({"every_n_train_steps": 4}, [4]),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, [2, 4]),  # wants every validation: 1, 2, 3, 4
    ],
)
def test_a_checkpoint_waits_for_the_end_of_the_rollout(build, trainer, tmp_path, triggers, steps):
    checkpoint = RolloutCheckpoint(dirpath=tmp_path, filename="{step}", save_top_k=-1, **triggers)
    run = trainer(
        callbacks=[checkpoint], enable_checkpointing=True, max_steps=5, limit_val_batches=1, num_sanity_val_steps=0,
        val_check_interval=1, check_val_every_n_epoch=None,
    )  # fmt: skip
    run.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=64, val_size=2))
    assert saved_steps(tmp_path) == steps


@pytest.mark.parametrize(("interval", "accumulate", "fine"), [(3, 1, False), (2, 1, True), (1, 2, True)])
def test_an_interval_that_never_meets_a_rollout_is_refused(build, trainer, tmp_path, interval, accumulate, fine):
    checkpoint = RolloutCheckpoint(every_n_train_steps=interval, dirpath=tmp_path)
    run = trainer(callbacks=[checkpoint], enable_checkpointing=True, accumulate_grad_batches=accumulate)
    data = SceneData(batch_size=2, train_size=8)
    if fine:
        run.fit(build(mini_batches=2), data)
    else:
        with pytest.raises(ValueError, match="every_n_train_steps=3.*multiples of 2"):
            run.fit(build(mini_batches=2), data)


def test_preemption_finishes_the_rollout_saves_and_stops(build, trainer, tmp_path):
    import os
    import signal

    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import CSVLogger

    class Scheduler(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    run = trainer(callbacks=[Scheduler(), Preemption()], max_steps=20, logger=CSVLogger(tmp_path, "", ""))
    run.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=64))
    assert run.global_step == 4
    assert torch.load(tmp_path / "checkpoints/preempted.ckpt", weights_only=False)["global_step"] == 4
    assert signal.getsignal(signal.SIGTERM) == handler
