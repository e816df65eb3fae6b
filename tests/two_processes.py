"""Run a function in two processes joined by gloo on loopback.

    def work(rank, shift):              # top level of a test module: the children import it by name
        total = torch.tensor(float(rank + shift))
        torch.distributed.all_reduce(total)
        return total.item()             # plain Python or CPU tensors: pickled back

    assert run_on_two(work, 1) == [3.0, 3.0]

The process group is up before ``work`` starts, and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set,
so that a Lightning Trainer with ``devices=2`` joins instead of starting processes of its own. Collectives that do not
match hang; the timeout kills both processes, so a hang is a failed test and not a stuck run.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

IMPORTED = [  # once, in the process that the others are forked from
    "lightning.pytorch", "torch.distributed.checkpoint", "torchmetrics", "peft", "open_clip", "diffusers",
    "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl", "uae.module", "uae.cli",
]  # fmt: skip


def run_on_two(work: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """``[work(0, *args), work(1, *args)]``, each in a fresh process; see `run_on`."""
    return run_on(2, work, *args, timeout=timeout)


def run_on(count: int, work: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
    """``work(rank, *args)`` of so many ranks, each in a fresh process.

    Raises:
        RuntimeError: A process raised (its traceback is the message) or died.
        TimeoutError: Not all finished within ``timeout`` seconds.
    """
    context = multiprocessing.get_context("forkserver")  # forks from a process that has imported, and done, nothing else
    context.set_forkserver_preload(IMPORTED)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    readers, processes = [], []
    for rank in range(count):
        reader, writer = context.Pipe(duplex=False)
        given = (writer, work, (rank, count), port, timeout, dict(os.environ), args)
        process = context.Process(target=_child, args=given, daemon=True)
        process.start()
        writer.close()  # the child holds the only other end, so its death ends our wait
        readers.append(reader)
        processes.append(process)
    try:
        return _results(readers, timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _results(readers: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"processes {set(range(len(readers))) - set(results)} not done after {timeout} s: killed")
        for reader in ready:
            rank = readers.index(reader)
            try:
                succeeded, result = pickle.loads(reader.recv_bytes())
            except EOFError:
                raise RuntimeError(f"process {rank} died without a result") from None
            if not succeeded:
                raise RuntimeError(f"process {rank} failed:\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(readers))]


def _child(
    writer: Connection,
    work: Callable[..., Any],
    place: tuple[int, int],
    port: int,
    timeout: float,
    environment: dict[str, str],
    args: tuple,
) -> None:
    rank, count = place
    os.environ.clear()
    os.environ |= environment | {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    try:
        import torch

        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", rank=rank, world_size=count, timeout=timedelta(seconds=timeout))
        reply = pickle.dumps((True, work(rank, *args)))  # pickled by value: shared memory would die with this process
        torch.distributed.destroy_process_group()
    except BaseException:
        reply = pickle.dumps((False, traceback.format_exc()))
    writer.send_bytes(reply)
