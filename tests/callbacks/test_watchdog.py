import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from callbacks.watchdog import Watchdog
from tests.two_processes import run_on_two
from uae.miniature.data import SceneData

ROOT = Path(__file__).parents[2]


def stuck_in_a_loop(file, words="in stuck_in_a_loop", seconds=30):
    """Wait until the file holds some words; what comes out does not depend on how long that took."""
    end = time.monotonic() + seconds
    while not (file.exists() and words in file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)


def fit(trainer, module, folder, watchdog, **options):
    trainer(callbacks=[watchdog], default_root_dir=folder, **options).fit(module, SceneData(batch_size=2, train_size=64))


@pytest.mark.parametrize("where", ["configure_model", "training_step", "validation_step"])
def test_a_step_that_takes_too_long_leaves_a_file_that_names_the_function(build, trainer, tmp_path, where):
    module, file = build(), tmp_path / "stacks/rank0.txt"
    function, calls = getattr(module, where), []

    def slow(*arguments):
        calls.append(arguments)
        if len(calls) == (2 if where == "training_step" else 1):
            stuck_in_a_loop(file)
        return function(*arguments)

    setattr(module, where, slow)
    with pytest.warns(UserWarning, match="no progress for 0.4 s: the stacks of this rank are in .*rank0.txt"):
        fit(trainer, module, tmp_path, Watchdog(0.4), max_steps=3, limit_val_batches=1)
    text = file.read_text()
    said = {"configure_model": "step 0, setting up,", "training_step": "step 1, training batch 1"}
    assert said.get(where, "step 0, sanity_check batch 0") in text
    assert "in stuck_in_a_loop" in text
    assert f'File "{__file__}"' in text


def test_a_run_without_delays_leaves_nothing_and_no_timer(build, trainer, tmp_path):
    fit(trainer, build(), tmp_path, Watchdog(60), limit_val_batches=1)
    assert not (tmp_path / "stacks").exists()
    (tmp_path / "stacks").mkdir()
    earlier = tmp_path / "stacks/rank0.txt"
    earlier.write_text("of the run before\n")
    fit(trainer, build(), tmp_path, Watchdog(60))
    assert earlier.read_text() == "of the run before\n"


FATAL = """
import time, types
from callbacks.watchdog import Watchdog
trainer = types.SimpleNamespace(log_dir={folder!r}, fast_dev_run=False, global_rank=3, global_step=7)
watchdog = Watchdog(0.2, fatal=True)
watchdog.setup(trainer, None, "fit")
watchdog.on_train_batch_start(trainer, None, None, 5)
def stuck(): time.sleep(60)
stuck()
"""


def test_it_ends_the_process_where_asked(tmp_path):
    command = [sys.executable, "-c", FATAL.format(folder=str(tmp_path))]
    assert subprocess.run(command, cwd=ROOT, timeout=50).returncode == 1
    text = (tmp_path / "stacks/rank3.txt").read_text()
    assert "rank 3, step 7, training batch 5, since 20" in text
    assert "in stuck" in text


def waiting(rank, folder):
    """Rank 1 is stuck on its own, rank 0 in the collective that waits for it."""
    from types import SimpleNamespace

    trainer = SimpleNamespace(log_dir=folder, fast_dev_run=False, global_rank=rank, global_step=0)
    watchdog, files = Watchdog(0.5), [Path(folder, f"stacks/rank{r}.txt") for r in range(2)]
    watchdog.setup(trainer, None, "fit")
    watchdog.on_train_batch_start(trainer, None, None, 0)
    if rank == 1:
        stuck_in_a_loop(files[1])
        stuck_in_a_loop(files[0], "in all_reduce")
    torch.distributed.all_reduce(torch.ones(1))
    watchdog.teardown(trainer, None, "fit")


def test_every_rank_says_where_it_is(tmp_path):
    run_on_two(waiting, str(tmp_path))
    first, second = ((tmp_path / f"stacks/rank{rank}.txt").read_text() for rank in range(2))
    assert "in all_reduce" in first
    assert "stuck_in_a_loop" not in first
    assert "in stuck_in_a_loop" in second
    assert "in all_reduce" not in second


def test_a_limit_is_positive():
    with pytest.raises(ValueError, match="Watchdog.limit=0 seconds; allowed: above 0"):
        Watchdog(0)
