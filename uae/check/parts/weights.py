"""The networks that an object holds, however deep, and their bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uae.check.parts.verdicts import Precision

DEEPEST, LONGEST = 6, 1000  # of attributes within attributes; of lists and dictionaries that are searched
LEAVES = (str, bytes, int, float, complex, bool, type(None), Tensor, torch.dtype, torch.device)


def modules_of(*owners: Any) -> list[nn.Module]:
    """The outermost networks in the attributes of some objects, each once, in the order they are met."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    for owner in owners:
        for module in _search(owner, seen, 0):
            found.setdefault(id(module), module)
    inner = {id(part) for module in found.values() for part in module.modules() if part is not module}
    return [module for key, module in found.items() if key not in inner]


def _search(owner: Any, seen: set[int], depth: int) -> Iterator[nn.Module]:
    if isinstance(owner, LEAVES) or id(owner) in seen or depth > DEEPEST:
        return
    seen.add(id(owner))
    if isinstance(owner, nn.Module):
        yield owner
    for value in _inside(owner):
        yield from _search(value, seen, depth + 1)


def _inside(owner: Any) -> list[Any]:
    """What an object holds: members of a container, or attributes."""
    if isinstance(owner, Mapping):
        return list(owner.values()) if len(owner) <= LONGEST else []
    if isinstance(owner, list | tuple | set | frozenset):
        return list(owner) if len(owner) <= LONGEST else []
    registered = ("_modules", "_parameters", "_buffers")
    attributes = {} if isinstance(owner, type) else getattr(owner, "__dict__", {})
    return [value for name, value in attributes.items() if name not in registered]


def tensors_of(*owners: Any) -> dict[str, Tensor]:
    """Parameters and buffers of all networks of some objects, by a name; what several share comes once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for number, module in enumerate(modules_of(*owners)):
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[f"{type(module).__name__}-{number}.{name}"] = tensor
    return found


def size_of(*owners: Any) -> int:
    """Bytes of all networks of some objects; memory that tensors share counts once."""
    sizes = {tensor.untyped_storage().data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors_of(*owners).values()}
    return sum(sizes.values())


def digest(tensor: Tensor) -> str:
    """A fingerprint of the bytes of a tensor."""
    whole = tensor.detach().contiguous().cpu()
    return hashlib.blake2b(whole.view(-1).view(torch.uint8).numpy().tobytes() if whole.numel() else b"", digest_size=16).hexdigest()


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Fingerprints by name."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def precision_of(*owners: Any) -> Precision:
    """What some objects compute in: exact if all their floating-point weights have 32 bits or more, and nothing is cast."""
    floats = [tensor for tensor in tensors_of(*owners).values() if tensor.is_floating_point()]
    cast = any(torch.is_autocast_enabled(kind) for kind in {"cpu", *(tensor.device.type for tensor in floats)})
    return Precision(not cast and all(tensor.dtype.itemsize >= 4 for tensor in floats))
