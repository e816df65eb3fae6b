"""Number of processes and dtypes of a run, read from the trainer's settings. A Trainer is not created, as it needs the GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from uae.strategy import FSDP2Strategy

TYPICAL = 8  # assumed number of GPUs per machine, if this machine has none


@dataclass(frozen=True)
class Processes:
    """The processes of a run and their dtypes.

    Args:
        count: Number of processes, one GPU each.
        assumed: Whether ``count`` is a guess, because the configuration asks for all GPUs and this machine has none.
        sharded: Whether the strategy is fsdp2.
        ddp: Whether the strategy is ddp.
        shards: Number of processes over which one copy of the weights is divided under fsdp2.
        per_node: Number of processes per machine.
        gathered_dtype: Dtype of gathered weights under fsdp2; None is the weights' own dtype.
        reduced_dtype: Dtype in which gradients are averaged under fsdp2; None is the gradients' own dtype.
        accumulate: Number of batches per optimizer step.
        cast_to: Dtype to which the trainer converts all weights; None converts nothing.
        autocast: Whether the trainer computes in 16 bits with weights of 32.
        on_gpu: Whether the plan is for GPUs.
    """

    count: int
    assumed: bool
    sharded: bool
    ddp: bool
    shards: int
    per_node: int
    gathered_dtype: torch.dtype | None
    reduced_dtype: torch.dtype | None
    accumulate: int
    cast_to: torch.dtype | None
    autocast: bool
    on_gpu: bool


def processes_of(trainer: Mapping[str, Any]) -> Processes:
    """The settings of ``trainer`` in a configuration, with its defaults."""
    accelerator, strategy = trainer.get("accelerator") or "auto", trainer.get("strategy") or "auto"
    here = torch.cuda.device_count()
    on_gpu = accelerator in ("gpu", "cuda", "auto")  # "auto" is planned for GPUs even where there are none
    devices = _devices(trainer.get("devices", "auto"))
    assumed = devices is None and on_gpu and not here
    local = devices if devices is not None else (here or TYPICAL) if on_gpu else 1
    sharded = isinstance(strategy, FSDP2Strategy) or strategy == "fsdp2"
    names = {"bfloat16": torch.bfloat16, "float32": torch.float32, None: None}
    gathered = names[strategy.param_dtype] if isinstance(strategy, FSDP2Strategy) else None
    reduced = names[strategy.reduce_dtype] if isinstance(strategy, FSDP2Strategy) else torch.float32
    count = local * (trainer.get("num_nodes") or 1)
    shards = strategy.shard_size if isinstance(strategy, FSDP2Strategy) else None
    return Processes(
        count=count,
        assumed=assumed,
        sharded=sharded,
        ddp=not sharded and ("ddp" in str(strategy).lower() or (strategy == "auto" and count > 1)),
        shards=shards or count,
        per_node=local,
        gathered_dtype=gathered if sharded else torch.bfloat16,
        reduced_dtype=reduced,
        accumulate=trainer.get("accumulate_grad_batches") or 1,
        cast_to={"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(str(trainer.get("precision"))),
        autocast=str(trainer.get("precision")) in ("bf16", "bf16-mixed", "16", "16-mixed"),
        on_gpu=on_gpu,
    )


def _devices(devices: Any) -> int | None:
    """Number of devices per machine that the configuration asks for; None is all that exist."""
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str):
        return None if devices == "auto" else len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, int):
        return None if devices == -1 else devices
    return None if devices is None else len(devices)
