"""Where a frozen component lives, and in what dtype."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

_TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,  # what 8-bit weights are computed in
}


@dataclass(frozen=True)
class Placement:
    """Memory settings of a frozen component.

    Args:
        dtype: Of its weights and its computation. "float8" stores weights in 8 bits and computes in bfloat16.
        device: E.g. "cuda:1" or "cpu"; None is wherever the policy is.
        offload: Wait on the CPU, and move to the device for as long as there is work.
    """

    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    device: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        """Refuse names that torch does not know, before anything is loaded."""
        if self.dtype not in _TORCH:
            raise ValueError(f"placement.dtype={self.dtype!r}; allowed: {', '.join(_TORCH)}; change placement.dtype")
        try:
            torch.device("cpu" if self.device is None else self.device)
        except RuntimeError:
            raise ValueError(
                f"placement.device={self.device!r} is no device; allowed: cpu, cuda, cuda:0, cuda:1, ..., or null "
                "(wherever the policy is); change placement.device"
            ) from None


def torch_dtype(placement: Placement) -> torch.dtype:
    """The dtype a component computes in."""
    return _TORCH[placement.dtype]


def working_device(placement: Placement, device: torch.device | str) -> torch.device:
    """Where a component computes: its own device, or else ``device``, the policy's."""
    return torch.device(device if placement.device is None else placement.device)


def settle(modules: Iterable[nn.Module], placement: Placement, device: torch.device | str) -> None:
    """Move frozen modules to where they wait: the working device, or the CPU if they are offloaded. Casts nothing."""
    _move(modules, torch.device("cpu") if placement.offload else working_device(placement, device))


@contextmanager
def at_work(modules: Iterable[nn.Module], placement: Placement, device: torch.device | str) -> Iterator[torch.device]:
    """Inside, the modules are on the working device, which is yielded; afterwards offloaded ones are on the CPU.

    May be nested, also with modules in common: the outermost block decides when a module leaves the device.
    """
    modules = list(modules)
    work = working_device(placement, device)
    for module in modules:
        _BLOCKS[module] = _BLOCKS.get(module, 0) + 1
    try:
        _move(modules, work)
        yield work
    finally:
        for module in modules:
            _BLOCKS[module] -= 1
        if placement.offload:
            _move([module for module in modules if not _BLOCKS[module]], torch.device("cpu"))


_BLOCKS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # how many blocks of `at_work` each module is in


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    if device.type == "cuda":
        devices, index = torch.cuda.device_count(), device.index
        if (index or 0) >= devices:
            raise ValueError(
                f"device {str(device)!r} is not on this machine; allowed: cpu"
                f"{''.join(f', cuda:{i}' for i in range(devices))}; change placement.device"
            )
        device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    with torch.inference_mode(False):  # weights moved inside inference mode could never enter a backward pass
        for module in modules:
            tensors = (tensor for part in (module.parameters(), module.buffers()) for tensor in part)
            if any(tensor.device != device for tensor in tensors):
                module.to(device)
