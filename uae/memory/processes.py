"""What the trainer's settings say about processes, without making a Trainer: that would ask for the GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from uae.strategy import FSDP2Strategy

TYPICAL = 8  # GPUs of a machine that is not this one


@dataclass(frozen=True)
class Processes:
    """How a run is spread out.

    Args:
        count: Processes, one GPU each.
        assumed: ``count`` is a guess: the configuration says "all GPUs", and there are none here.
        sharded: The strategy is fsdp2.
        ddp: The strategy is ddp.
        shards: Processes that one copy of the weights is divided over under fsdp2.
        per_node: Processes of a machine.
        gathered_dtype: Of weights gathered under fsdp2; None is their own.
        reduced_dtype: Of gradients averaged under fsdp2; None is their own.
        accumulate: Batches per optimizer step.
        cast_to: Dtype that the trainer turns every weight into, or None.
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
        on_gpu=on_gpu,
    )


def _devices(devices: Any) -> int | None:
    """Per node; None is all there are."""
    if isinstance(devices, str) and devices.lstrip("-").isdigit():
        devices = int(devices)
    if isinstance(devices, str):
        return None if devices == "auto" else len([part for part in devices.split(",") if part.strip()])
    if isinstance(devices, int):
        return None if devices == -1 else devices
    return None if devices is None else len(devices)
