"""What a process sends: collectives by name, and their bytes."""

from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Collectives(TorchDispatchMode):
    """Inside, counts collectives and the bytes of the larger of their two sides, the whole of what is shared."""

    def __init__(self):
        super().__init__()
        self.counts, self.bytes = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.counts[func._opname] += 1
            self.bytes[func._opname] += max((x.nbytes for x in tensors(args)), default=0)
        return func(*args, **(kwargs or {}))


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors(value)
