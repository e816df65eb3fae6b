import errno
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback

from callbacks.checkpoint import RolloutCheckpoint
from tests.strategy.test_strategy import module as two_module
from tests.strategy.test_strategy import trainer as two_trainer
from tests.two_processes import run_on_two
from uae import cli
from uae.checkpoints.files import CheckpointFiles, read
from uae.miniature.data import SceneData


def saved_steps(folder):
    return sorted(torch.load(file, weights_only=False)["global_step"] for file in folder.glob("*.ckpt"))


@pytest.mark.parametrize(
    ("triggers", "steps"),
    [
        ({"train_time_interval": timedelta(0)}, [2, 4, 5]),  # wants every step
        ({"every_n_train_steps": 4}, [4, 5]),
        ({"every_n_epochs": 1, "save_on_train_epoch_end": False}, [2, 4, 5]),  # wants every validation: 1, 2, 3, 4
        ({"every_n_epochs": 1, "save_on_train_epoch_end": True}, [5]),  # the run ends inside an epoch, and a rollout
    ],
)
def test_a_checkpoint_waits_for_the_end_of_the_rollout_or_of_the_run(build, trainer, tmp_path, triggers, steps):
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


class Full:
    """A disk with room for what comes before some save, and after some other."""

    def __init__(self, saves):
        self.saves, self.count, self.save = saves, 0, torch.save

    def __call__(self, content, file):
        self.count += 1
        if self.count in self.saves:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.save(content, file)


def fit_on_a_full_disk(build, trainer, monkeypatch, folder, full, **options):
    checkpoint = RolloutCheckpoint(2, dirpath=folder, filename="{step}", save_last="link", **options)
    run = trainer(callbacks=[checkpoint], enable_checkpointing=True, max_steps=10, plugins=[CheckpointFiles()])
    with monkeypatch.context() as patch:
        patch.setattr("uae.checkpoints.files.torch.save", Full(full))
        run.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=64))
    return run, checkpoint


@pytest.mark.parametrize(("full", "kept"), [({3}, 10), ({4, 5}, 6), ({1}, 10)])
def test_a_full_disk_costs_a_checkpoint_and_not_the_run(build, trainer, tmp_path, monkeypatch, full, kept):
    with pytest.warns(UserWarning, match="step=.*cannot be written: No space left on device; training goes on"):
        run, checkpoint = fit_on_a_full_disk(build, trainer, monkeypatch, tmp_path, full)
    assert run.global_step == 10
    last = tmp_path / f"step={kept}.ckpt"  # rotation removed the earlier ones only when this was complete
    assert {path.name for path in tmp_path.iterdir()} == {last.name, "last.ckpt"}
    assert (tmp_path / "last.ckpt").resolve() == last
    assert checkpoint.best_model_path == str(last)
    assert read(last)["global_step"] == kept


def test_the_best_checkpoints_survive_a_full_disk(build, trainer, tmp_path, monkeypatch):
    options = {"monitor": "reward/mean", "mode": "max", "save_top_k": 2}
    with pytest.warns(UserWarning, match="training goes on"):
        _, checkpoint = fit_on_a_full_disk(build, trainer, monkeypatch, tmp_path, {2, 3}, **options)
    stored = {str(path) for path in tmp_path.glob("step=*.ckpt")}
    assert stored == set(checkpoint.best_k_models)
    assert checkpoint.best_model_path in stored


def test_a_disk_that_stays_full_ends_the_run_in_words(build, trainer, tmp_path, monkeypatch):
    with (
        pytest.warns(UserWarning, match="training goes on"),
        pytest.raises(RuntimeError, match=r"2 checkpoints in a row.*No space left.*--ckpt_path last") as stop,
    ):
        fit_on_a_full_disk(build, trainer, monkeypatch, tmp_path, {2, 4, 5, 6}, max_failures=2)
    assert cli.mistake(stop.value) == str(stop.value)
    assert read(tmp_path / "last.ckpt")["global_step"] == 6  # 4 failed alone, 8 and 10 in a row


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({"save_last": "link"}, {"step=6.ckpt": 6, "last.ckpt": 6}),
        ({"save_last": True}, {"step=6.ckpt": 6, "last.ckpt": 6}),
        ({}, {"step=6.ckpt": 6}),
        ({"save_top_k": -1, "save_last": "link"}, {"step=4.ckpt": 4, "step=6.ckpt": 6, "last.ckpt": 6}),
        ({"save_top_k": 0, "save_last": True}, {"last.ckpt": 6}),
        ({"save_top_k": 0}, {}),
        ({"monitor": "reward/mean", "mode": "min"}, {"step=4.ckpt": 4, "last.ckpt": 6}),
    ],
    ids=str,
)
@pytest.mark.parametrize("end", [{"max_steps": 6}, {"max_epochs": 1, "max_steps": -1}], ids=["steps", "epochs"])
def test_the_last_step_is_always_saved(build, trainer, tmp_path, options, files, end):
    """Also between two intervals, and where only the best are kept."""
    checkpoint = RolloutCheckpoint(4, dirpath=tmp_path, filename="{step}", enable_version_counter=False, **options)
    run = trainer(callbacks=[checkpoint], enable_checkpointing=True, plugins=[CheckpointFiles()], **end)
    run.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=6))
    assert {path.name: read(path)["global_step"] for path in tmp_path.iterdir()} == files


def test_a_finished_run_that_is_continued_goes_on_from_its_end(build, trainer, tmp_path):
    """One epoch, then another: bit for bit the run of two epochs. The first ends between two intervals."""

    def fit(folder, epochs, resume=None):
        checkpoint = RolloutCheckpoint(4, dirpath=tmp_path / folder, filename="{step}", save_last="link")
        module = build(mini_batches=2)
        settings = {"enable_checkpointing": True, "plugins": [CheckpointFiles()], "max_steps": -1, "max_epochs": epochs}
        trainer(callbacks=[checkpoint], **settings).fit(module, SceneData(batch_size=2, train_size=6), ckpt_path=resume)
        return module.state_dict()

    straight = fit("straight", 2)
    fit("parts", 1)
    resumed = fit("parts", 2, resume="last")
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


class Watching(Callback):
    """Looks at the checkpoints when a run ends, before and after it has been exported."""

    def __init__(self, folder):
        self.folder, self.seen = folder, []

    def on_train_end(self, run, module):
        self.seen = saved_steps(self.folder)


@pytest.mark.parametrize(
    "options", [{}, {"monitor": "score", "mode": "max"}, {"every_n_train_steps": None, "every_n_epochs": 1}], ids=str
)
@pytest.mark.parametrize("end", [{"max_steps": 6}, {"max_epochs": 1, "max_steps": -1}], ids=["steps", "epochs"])
def test_the_last_step_is_saved_after_everything_else(build, trainer, tmp_path, options, end):
    """A run that is killed before its export has a step left, and its export is made when it goes on."""
    every = {"every_n_train_steps": 2, "filename": "{step}", "save_top_k": -1, "save_last": True, **options}
    watching = Watching(tmp_path)
    run = trainer(
        callbacks=[Validated(), RolloutCheckpoint(dirpath=tmp_path, **every), watching], enable_checkpointing=True,
        plugins=[CheckpointFiles()], limit_val_batches=1, val_check_interval=2, check_val_every_n_epoch=None, **end,
    )  # fmt: skip
    run.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=6, val_size=2))
    assert max(watching.seen, default=0) == 4
    assert saved_steps(tmp_path)[-2:] == [6, 6]  # its own, and the last


class Validated(Callback):
    """Logs the step as a metric of the validation."""

    def on_validation_epoch_end(self, run, module):
        module.log("score", float(run.global_step))


@pytest.mark.parametrize("interval", [2, 4])  # of checkpoints; a validation follows every fourth step
def test_a_checkpoint_is_ranked_by_the_validation_of_its_own_step(build, trainer, tmp_path, interval):
    checkpoint = RolloutCheckpoint(
        interval, dirpath=tmp_path, filename="{step}", monitor="score", mode="max", save_top_k=-1, save_last="link"
    )
    seen = []
    write = checkpoint._save_checkpoint
    checkpoint._save_checkpoint = lambda run, path: (seen.append((run.global_step, Path(path).name)), write(run, path))
    run = trainer(
        callbacks=[Validated(), checkpoint], enable_checkpointing=True, max_steps=12, limit_val_batches=1, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=1, plugins=[CheckpointFiles()],
    )  # fmt: skip
    run.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=64, val_size=2))
    assert {Path(path).name: float(score) for path, score in checkpoint.best_k_models.items()} == {
        f"step={step}.ckpt": step for step in (4, 8, 12)
    }
    assert [step for step, name in seen if name == "last.ckpt"] == list(range(interval, 12, interval))  # nothing is lost meanwhile
    assert {path.name: read(path)["global_step"] for path in tmp_path.iterdir()} == {
        "step=4.ckpt": 4, "step=8.ckpt": 8, "step=12.ckpt": 12, "last.ckpt": 12,
    }  # fmt: skip


def test_last_is_the_furthest_that_loads(build, trainer, tmp_path):
    def fit(max_steps, resume="last"):
        checkpoint = RolloutCheckpoint(2, filename="{step}", save_top_k=-1, save_last="link")
        settings = {"default_root_dir": tmp_path, "enable_checkpointing": True, "plugins": [CheckpointFiles()]}
        run = trainer(callbacks=[checkpoint], max_steps=max_steps, **settings)
        run.fit(build(mini_batches=2), SceneData(batch_size=2, train_size=64), ckpt_path=resume)
        return Path(run.ckpt_path).name if run.ckpt_path else None

    assert fit(6) is None  # one command starts a run and continues it
    folder = tmp_path / "checkpoints"
    (folder / "step=8.ckpt.partial").write_bytes(b"killed")
    touch(folder / "step=4.ckpt", 10)  # copied
    assert fit(8) == "step=6.ckpt"
    assert not list(folder.glob("*.partial"))
    (folder / "step=8.ckpt").rename(folder / "preempted.ckpt")
    assert fit(8) == "preempted.ckpt"
    truncate(folder / "preempted.ckpt")
    with pytest.warns(UserWarning, match=r"skipped.*preempted\.ckpt.*truncated"):
        assert fit(10) == "step=6.ckpt"
    for path in folder.glob("*.ckpt"):
        if path.exists():
            truncate(path)
    with pytest.raises(ValueError, match=r"none of \d checkpoints in .* can be loaded.*ckpt_path"):
        fit(10)
    settings = {"enable_checkpointing": True, "default_root_dir": tmp_path / "nowhere"}
    run = trainer(callbacks=[RolloutCheckpoint()], **settings)
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*nowhere"):
        run.validate(build(), SceneData(), ckpt_path="last")


def touch(path, seconds):
    now = path.stat().st_mtime + seconds
    os.utime(path, (now, now))


def truncate(path):
    path = path.resolve()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    os.truncate(path, path.stat().st_size // 2)
    os.utime(path, ns=times)


class FullOnce:
    """Shards find no room the first time."""

    def __init__(self, write):
        self.write, self.calls = write, 0

    def __call__(self, *args):
        self.calls += 1
        if self.calls == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.write(*args)


def fit_on_two(strategy, build_module, folder):
    checkpoint = RolloutCheckpoint(2, dirpath=folder, filename="{step}", save_last="link")
    run = two_trainer(strategy, folder, max_steps=4, callbacks=[checkpoint], enable_checkpointing=True)
    run.strategy.checkpoint_io = CheckpointFiles()
    with pytest.warns(UserWarning, match="training goes on"):
        run.fit(build_module(), SceneData(batch_size=2, train_size=16))
    return run.global_step, checkpoint.failures, sorted(path.name for path in folder.iterdir())


def one_disk_is_full(rank, build_module, folder):
    """The disk of one process is full at the first save: the second's with shards, the first's with a file."""
    results = []
    for strategy, failing in (("fsdp2", 1), ("ddp", 0)):
        with pytest.MonkeyPatch.context() as patch:
            if rank == failing and strategy == "fsdp2":
                full = FullOnce(dcp.FileSystemWriter.write_data)
                patch.setattr(dcp.FileSystemWriter, "write_data", lambda *args, full=full: full(*args))
            elif rank == failing:
                patch.setattr("uae.checkpoints.files.torch.save", Full({1}))
            results.append(fit_on_two(strategy, build_module, Path(folder, strategy)))
    return results


@pytest.mark.slow
def test_ranks_agree_that_a_disk_is_full(tmp_path):
    left = ["last.ckpt", "step=4.ckpt"]
    expected = [(4, 0, left), (4, 0, left)]
    assert run_on_two(one_disk_is_full, two_module, str(tmp_path), timeout=200) == [expected, expected]
