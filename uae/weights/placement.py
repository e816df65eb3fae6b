"""Device and dtype of a frozen component."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from packaging.version import Version
from torch import nn

_TORCH = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8": torch.bfloat16,  # 8-bit weights are converted to this dtype for computation
}


@dataclass(frozen=True)
class Placement:
    """Memory settings of a frozen component.

    Args:
        dtype: Dtype of weights and computation. "float8" stores weights in 8 bits and computes in bfloat16.
        device: Device of the component, e.g. "cuda:1" or "cpu"; None is the policy's device.
        offload: Keep the component on the CPU and move it to the device only while it computes.
    """

    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    device: str | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        """Check both names before anything is loaded.

        Raises:
            ValueError: ``dtype`` or ``device`` is unknown to torch.
        """
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
    """The dtype in which a component computes."""
    return _TORCH[placement.dtype]


def dtype_argument(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument by which ``from_pretrained`` of diffusers takes a dtype: ``dtype`` since 0.42, ``torch_dtype`` before."""
    return {"dtype" if Version(metadata.version("diffusers")) >= Version("0.42") else "torch_dtype": dtype}


def working_device(placement: Placement, device: torch.device | str) -> torch.device:
    """The device on which a component computes.

    Args:
        placement: Settings of the component.
        device: The policy's device, which is used if the placement has none.
    """
    return torch.device(device if placement.device is None else placement.device)


def frozen(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module in evaluation mode, without gradients, and with its weights in ``dtype``. Buffers that are computed stay exact."""
    module.eval().requires_grad_(False)
    for weight in module.state_dict(keep_vars=True).values():
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return module


def settle(modules: Iterable[nn.Module], placement: Placement, device: torch.device | str) -> None:
    """Move frozen modules to their device, or to the CPU if they are offloaded. Dtypes do not change.

    Args:
        modules: The networks of one component.
        placement: Settings of the component.
        device: The policy's device, which is used if the placement has none.

    Raises:
        ValueError: The device does not exist on this machine.
    """
    _move(modules, torch.device("cpu") if placement.offload else working_device(placement, device))


@contextmanager
def at_work(modules: Iterable[nn.Module], placement: Placement, device: torch.device | str) -> Iterator[torch.device]:
    """Keep modules on their working device inside the block; offloaded ones return to the CPU afterwards.

    Blocks may be nested and may share modules: a module returns to the CPU at the end of its outermost block.

    Args:
        modules: The networks of one component.
        placement: Settings of the component.
        device: The policy's device, which is used if the placement has none.

    Yields:
        The working device.
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


_BLOCKS: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # number of open `at_work` blocks of each module


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
