"""Checkpoints on disk: read without copying, loaded entirely or not at all."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PICKLES = (".bin", ".pth", ".pt")
NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state|task_head)")  # seen beside weights
SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<suffix>\.\w+)$")
WRAPPINGS = ("state_dict", "module", "model")  # what training frameworks put around the weights


def read_state(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, backed by its files: memory is used by what is used.

    Args:
        path: A ``.safetensors``, ``.bin``, ``.pth`` or ``.pt`` file, or a folder with one of them or with shards (with or
            without an index). Where a folder has both kinds, safetensors are read.

    Raises:
        FileNotFoundError: Nothing is there, or a shard is missing.
        ValueError: A file is broken, would run code when opened, holds something else than tensors, or a folder leaves
            open which of its files is meant.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    state: dict[str, Tensor] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        part = _read_file(file)
        twice = state.keys() & part.keys()
        if twice:
            raise ValueError(f"{min(twice)!r} is in {str(file)!r} and in another file beside it; keep one of them")
        state |= part
    return state


def weight_files(folder: Path) -> list[Path]:
    """The files that make up the checkpoint in a folder.

    Raises:
        FileNotFoundError: There are none, or some of the shards are missing.
        ValueError: Several checkpoints lie side by side.
    """
    for suffixes in ((".safetensors",), PICKLES):
        indexes = [index for suffix in suffixes for index in sorted(folder.glob(f"*{suffix}.index.json"))]
        if len(indexes) == 1:
            return _indexed(indexes[0])
        files = [f for f in sorted(folder.iterdir()) if f.suffix in suffixes and not NOT_WEIGHTS.match(f.name)]
        if indexes or len({match["stem"] if (match := SHARD.match(f.name)) else f.name for f in files}) > 1:
            names = ", ".join(f.name for f in indexes or files[:6])
            raise ValueError(f"{str(folder)!r} holds several checkpoints ({names}); keep one, or name a file")
        if files:
            _check_numbers(files)
            return files
    raise FileNotFoundError(
        f"no weights in {str(folder)!r}: neither *.safetensors nor {', '.join('*' + s for s in PICKLES)}"
    )


def _indexed(index: Path) -> list[Path]:
    """The shards an index names, each once."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of shards ({type(error).__name__}); copy it again") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} shards are missing in {str(index.parent)!r}: {', '.join(missing)}"
        )
    return [index.parent / name for name in names]


def _check_numbers(files: Sequence[Path]) -> None:
    """Raise unless shards without an index are all there."""
    match = SHARD.match(files[0].name)
    if not match:
        return
    numbers = range(1, int(match["total"]) + 1)
    expected = [f"{match['stem']}-{i:05d}-of-{match['total']}{match['suffix']}" for i in numbers]
    missing = sorted(set(expected) - {file.name for file in files})
    if missing:
        folder = str(files[0].parent)
        raise FileNotFoundError(
            f"{len(missing)} of {len(expected)} shards are missing in {folder!r}: {', '.join(missing)}"
        )


def _read_file(file: Path) -> dict[str, Tensor]:
    """The tensors of one file, mapped into memory where its format allows."""
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise ValueError(_broken(file, str(error))) from error
    if file.suffix not in PICKLES:
        raise ValueError(
            f"{str(file)!r} is no checkpoint; allowed: .safetensors, {', '.join(PICKLES)}, or a folder of them"
        )
    state = _unpickle(file)
    for name in WRAPPINGS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    entries = state.items() if isinstance(state, Mapping) else [("all of it", state)]
    other = [str(name) for name, value in entries if not isinstance(value, Tensor)]
    if other or not isinstance(state, Mapping):
        raise ValueError(
            f"{str(file)!r} holds entries that are no named tensors ({', '.join([*other, 'a bare tensor'][:1])}); save a state dict"
        )
    return dict(state)


def _unpickle(file: Path) -> Any:
    """What torch wrote, as long as opening it runs no code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        if re.search(r"GLOBAL|Unsupported (global|class)|REDUCE|BUILD", str(error)):
            target = file.with_suffix(".safetensors").name
            raise ValueError(
                f"{str(file)!r} holds more than tensors, and opening it would run code from it; where you trust it, convert it: "
                f"safetensors.torch.save_file(torch.load({file.name!r}, weights_only=False), {target!r})"
            ) from error
        raise ValueError(_broken(file, "no file of torch.save")) from error
    except (RuntimeError, EOFError, IndexError, KeyError, OSError) as error:
        raise ValueError(_broken(file, str(error).splitlines()[0][:120] if str(error) else "it ends early")) from error


def _broken(file: Path, reason: str) -> str:
    with file.open("rb") as stream:
        pointer = stream.read(20).startswith(b"version https://git")
    fault = "is a Git LFS pointer, not the file" if pointer else f"is truncated or damaged ({reason})"
    return f"{str(file)!r} {fault}; download or copy it again"


@torch.no_grad()
def load_into(
    module: nn.Module, state: Mapping[str, Tensor], source: str, key: str, ignore: Sequence[str] = ()
) -> None:
    """Load a module's parameters and buffers; the module is left as it was unless everything fits.

    The module's dtypes are kept. Parameters on the meta device take the checkpoint's tensors (without a copy where the dtype
    is the same); all others are copied into. Of tied weights one name is enough.

    Args:
        module: What to load.
        state: Tensors by name.
        source: Where they come from, for the message.
        key: What to change in the configuration, for the message.
        ignore: Regular expressions, matched at the start of names that may be missing or left over.

    Raises:
        ValueError: Names are missing or left over, or shapes differ; grouped by layer type in one line.
    """
    wanted = module.state_dict(keep_vars=True)
    aliases = _aliases(wanted)
    skipped = re.compile("|".join(f"(?:{pattern})" for pattern in ignore) or r"(?!)")
    given = {name: value for name, value in state.items() if name in wanted or not skipped.match(name)}
    missing = [
        name
        for name in wanted
        if name not in given and not skipped.match(name) and not any(alias in given for alias in aliases[name])
    ]
    shapes = {
        name: f"{name} is {list(value.shape)}, expected {list(wanted[name].shape)}"
        for name, value in given.items()
        if name in wanted and value.shape != wanted[name].shape
    }
    faults = [
        _report("missing", {name: name for name in missing}),
        _report("unexpected", {name: name for name in given if name not in wanted}),
        _report("of another shape", shapes),
        _report("tied here but different there", {} if shapes else _torn(given, aliases)),
    ]
    if any(faults):
        raise ValueError(
            f"{source} does not fit {type(module).__name__}: {'; '.join(filter(None, faults))}; correct {key}"
        )
    for name, target in wanted.items():
        if name in given:
            _place(module, [name, *aliases[name]], target, given[name])
    waiting = [name for name, tensor in [*module.named_parameters(), *module.named_buffers()] if tensor.is_meta]
    waiting = [name for name in waiting if not skipped.match(name)]
    if waiting:  # buffers that no checkpoint holds
        raise ValueError(f"{type(module).__name__} was built without memory, and {source} cannot fill {waiting[0]}")


def _aliases(wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """The other names of every tensor (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, tensor in wanted.items():
        names.setdefault(id(tensor), []).append(name)
    return {name: [other for other in same if other != name] for same in names.values() for name in same}


def _torn(given: Mapping[str, Tensor], aliases: Mapping[str, list[str]]) -> dict[str, str]:
    """Names that are one tensor in the module and several different ones in the checkpoint."""
    return {
        name: f"{name} and {other}"
        for name, others in aliases.items()
        for other in others
        if name < other and name in given and other in given and not torch.equal(given[name], given[other])
    }


def _place(module: nn.Module, names: Sequence[str], target: Tensor, value: Tensor) -> None:
    """Copy into a tensor, or put a new one in the place of one without memory, under all its names."""
    if not target.is_meta:
        target.copy_(value)
        return
    filled = value.to(target.dtype)
    if isinstance(target, nn.Parameter):
        filled = nn.Parameter(filled, requires_grad=target.requires_grad)
    for name in names:
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, filled)


def _report(fault: str, names: Mapping[str, str], most: int = 6) -> str:
    """E.g. ``missing 36 of layers.*.self_attn (e.g. layers.0.self_attn.q_proj.weight), 2 of ...``; empty without names."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(group_of(name), []).append(name)
    parts = [f"{len(members)} of {group} (e.g. {names[members[0]]})" for group, members in groups.items()]
    more = [f"and {len(parts) - most} more groups"] if len(parts) > most else []
    return f"{fault} {', '.join(parts[:most] + more)}" if parts else ""


def group_of(name: str) -> str:
    """Names of the same part of a layer, in all layers, share a group: ``layers.*.self_attn`` for its projections."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    parts = parts[:-1] or parts
    return ".".join(parts[:-1] if "*" in parts[:-1] else parts)


def save_state(folder: str | Path, name: str, state: Mapping[str, Tensor]) -> Path:
    """Write ``<name>.safetensors`` into a folder (created if need be); aliases become copies."""
    from safetensors.torch import save_file

    file = Path(folder, f"{name}.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, file)
    return file
