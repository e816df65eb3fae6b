"""The machine: GPUs, processors, memory, disk, and whether results can be written."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from pathlib import Path

import torch

from uae.cli.errors import OUTPUTS
from uae.cli.run_folder import lock
from uae.doctor.finding import Finding, note, ok, wrong

GIB = 2**30
LITTLE_MEMORY, LITTLE_DISK, LITTLE_SHARED = 4.0, 5.0, 1.0  # GiB
DRIVER = Path("/proc/driver/nvidia/version")  # is there where the kernel has NVIDIA's driver
LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))  # of a container
SHARED = Path("/dev/shm")
ELSEWHERE = "--trainer.default_root_dir FOLDER, or make room"


def check_machine(outputs: Path = Path(OUTPUTS)) -> list[Finding]:
    """The findings about this machine.

    Args:
        outputs: Folder of all runs, which need not exist.
    """
    return [*gpus(), *processors(), memory(), *shared_memory(), disk(outputs), writing(outputs)]


def gpus() -> list[Finding]:
    """Every GPU, a small product on it, and whether GPUs read each other's memory; or why there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        return [_no_gpu(DRIVER.exists(), torch.version.cuda)]
    return [*map(_gpu, range(count)), *peers(count)]


def _no_gpu(driver: bool, cuda: str | None) -> Finding:
    if driver and cuda is None:
        return wrong("there is an NVIDIA driver, but this torch is built for CPUs", "install torch and torchvision with CUDA")
    if driver:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        asked = f"CUDA_VISIBLE_DEVICES={hidden!r}, " if hidden is not None else ""
        return wrong(
            f"there is an NVIDIA driver, but torch (built for CUDA {cuda}) sees no GPU ({asked}driver: {DRIVER.read_text()[:80]!r})",
            "compare nvidia-smi with that CUDA version: update the driver, or install an older torch; unset CUDA_VISIBLE_DEVICES",
        )
    return note("no GPU: the miniatures and all tests run on CPUs, real systems need a GPU")


def _gpu(index: int) -> Finding:
    name, place = torch.cuda.get_device_name(index), torch.device("cuda", index)
    try:
        free, total = torch.cuda.mem_get_info(index)
        left = torch.eye(64, device=place, dtype=torch.bfloat16)
        works = bool((left @ left == left).all())
    except RuntimeError as error:  # another process holds all of its memory, or the kernels are for other GPUs
        return wrong(f"cuda:{index} {name} cannot compute: {str(error).splitlines()[0]}", "see nvidia-smi for other processes on it")
    if not works:
        return wrong(f"cuda:{index} {name} computes a wrong product in bfloat16", "set CUDA_VISIBLE_DEVICES to other GPUs")
    text = f"cuda:{index} {name}, {free / GIB:.0f} of {total / GIB:.0f} GiB free, CUDA {torch.version.cuda}"
    return ok(text) if free > 0.9 * total else note(text, "another process has the rest: see nvidia-smi")


def peers(count: int) -> list[Finding]:
    """Whether every GPU can read the memory of every other.

    Args:
        count: Number of GPUs.
    """
    if count < 2:
        return []
    apart = [f"{a}-{b}" for a in range(count) for b in range(count) if a != b and not torch.cuda.can_device_access_peer(a, b)]
    if not apart:
        return [ok(f"all {count} GPUs read each other's memory")]
    return [note(f"GPUs that cannot read each other's memory: {', '.join(apart)}", "if a run hangs in NCCL: NCCL_P2P_DISABLE=1")]


def processors() -> list[Finding]:
    """How many processors this process may use, and how many threads it is told to use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    text = f"{allowed} processors, {threads} threads"
    return [ok(text) if threads <= allowed else note(text, f"more threads than processors are slow: OMP_NUM_THREADS={allowed}")]


def memory() -> Finding:
    """The memory of this machine, or of its container."""
    total = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    limits = [path.read_text().strip() for path in LIMITS if path.is_file()]
    total = min([total, *(float(limit) for limit in limits if limit.isdecimal())]) / GIB
    if total >= LITTLE_MEMORY:
        return ok(f"{total:.0f} GiB of memory")
    return note(f"{total:.1f} GiB of memory; the miniature needs 2, its tests {LITTLE_MEMORY:g}")


def shared_memory(folder: Path = SHARED) -> list[Finding]:
    """The memory that data-loading processes hand batches over in.

    Args:
        folder: Where it is mounted.
    """
    if not folder.is_dir():
        return []
    size = shutil.disk_usage(folder).total / GIB
    if size >= LITTLE_SHARED:
        return [ok(f"{size:.0f} GiB of shared memory for data-loading processes")]
    cure = "docker run --shm-size=8g, or data.init_args.num_workers: 0"
    return [note(f"{size * 1024:.0f} MiB of shared memory: data-loading processes may end with a bus error", cure)]


def disk(outputs: Path) -> Finding:
    """Free space where results go.

    Args:
        outputs: Folder of all runs.
    """
    free = shutil.disk_usage(_existing(outputs)).free / GIB
    if free >= LITTLE_DISK:
        return ok(f"{free:.0f} GiB free on the disk of {outputs}")
    text = f"{free:.1f} GiB free on the disk of {outputs}; a checkpoint of full finetuning is three times its weights"
    return wrong(text, ELSEWHERE) if free < 1 else note(text, ELSEWHERE)


def writing(outputs: Path) -> Finding:
    """Whether results can be written, and folders locked.

    Args:
        outputs: Folder of all runs.
    """
    place = _existing(outputs)
    try:
        with tempfile.TemporaryDirectory(dir=place) as folder, warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            guard = lock(Path(folder))
            if guard is not None:
                guard.release()
    except OSError as error:
        return wrong(f"{outputs} cannot be written: {error}", ELSEWHERE)
    return note(f"{outputs}: {said[0].message}") if said else ok(f"{outputs} can be written and locked")


def _existing(folder: Path) -> Path:
    """A folder, or the nearest one above it that exists."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
