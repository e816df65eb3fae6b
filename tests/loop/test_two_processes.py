import multiprocessing
import os
import threading
import time

import pytest
import torch

from tests.two_processes import run_on_two


def total(rank, shift):
    value = torch.tensor(float(rank + shift))
    torch.distributed.all_reduce(value)
    return value, {key: os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}


def raise_on_one(rank):
    if rank == 1:
        raise KeyError("the reason")
    torch.distributed.barrier()  # waits for a process that never comes


def hang(rank):
    threading.Event().wait()


def test_results_come_back_by_rank():
    for rank, (value, names) in enumerate(run_on_two(total, 3)):
        assert value == 3 + 4
        assert names == {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}


def test_a_failure_is_shown_and_ends_the_other_process():
    with pytest.raises(RuntimeError, match="(?s)process 1 failed.*the reason"):
        run_on_two(raise_on_one)
    assert not multiprocessing.active_children()


def test_a_hang_is_killed():
    start = time.monotonic()
    with pytest.raises(TimeoutError, match="killed"):
        run_on_two(hang, timeout=3)
    assert time.monotonic() - start < 20
    assert not multiprocessing.active_children()
