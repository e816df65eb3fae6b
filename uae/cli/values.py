"""Checks of values that the parser's types let pass, before anything is built from them."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jsonargparse import Namespace

LONGEST_NAME = 200  # bytes; file systems take 255, and files in the folder add endings
LARGEST_SEED = 2**32 - 1
TRAINER_AT_LEAST = {  # what Lightning does not check itself
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
}
FEW_PROCESSES = 4  # may run on any machine, however few cores it has


def check_values(config: Namespace) -> None:
    """Check the parsed configuration of a subcommand.

    Raises:
        ValueError: A value cannot be meant; the message is one line with its key.
    """
    _check_run_name(str(config["run_name"]))
    seed = config.get("seed_everything")
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise ValueError(f"seed_everything={seed}; allowed: 0 to {LARGEST_SEED}")
    _check_trainer(config["trainer"])
    for key, value in leaves(config):
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{key}=nan; allowed: a number")


def check_accelerator(trainer: Mapping[str, Any]) -> None:
    """Check that the GPU that a trainer is to use is there. A plan of memory needs none.

    Raises:
        ValueError: It is not.
    """
    accelerator = trainer.get("accelerator")
    if accelerator in ("gpu", "cuda") and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ValueError(
            f"trainer.accelerator={accelerator}, but torch sees no GPU; allowed on this machine: cpu, auto; for the reason: "
            "python -m uae.doctor"
        )


def _check_run_name(name: str) -> None:
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or any(part.startswith(("-", "~")) for part in parts) or not name.isprintable():
        raise ValueError(
            f"run_name={name!r}; allowed: the name of a folder below outputs/, or several joined by '/', none of them empty, "
            "'.' or '..' and none beginning with '-' or '~'"
        )
    if longest := max((part for part in parts if len(part.encode()) > LONGEST_NAME), key=len, default=""):
        raise ValueError(f"run_name='{name[:40]}...' has a part of {len(longest.encode())} bytes; allowed: {LONGEST_NAME}")


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    for name, least in TRAINER_AT_LEAST.items():
        if trainer[name] is not None and trainer[name] < least:
            raise ValueError(f"trainer.{name}={trainer[name]}; allowed: {least} or more")
    devices, most = str(trainer["devices"]), max(FEW_PROCESSES, os.cpu_count() or 1)
    if trainer["accelerator"] == "cpu" and devices.isdecimal() and int(devices) > most:
        raise ValueError(
            f"trainer.devices={devices}, which on accelerator cpu is the number of processes; allowed on this machine: up to {most}"
        )


def leaves(node: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """All values of a configuration that are no containers, with their dotted keys."""
    if isinstance(node, Namespace):
        node = vars(node)
    if isinstance(node, Mapping):
        for name, inner in node.items():
            yield from leaves(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(node, (list, tuple)):
        for inner in node:
            yield from leaves(inner, key)
    else:
        yield key, node
