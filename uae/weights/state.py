"""State dicts on disk: reading them without copying, and loading them into a module entirely or not at all."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PICKLES = (".bin", ".pth", ".pt")
NOT_WEIGHTS = re.compile(r"^(training_args|optimizer|scheduler|scaler|rng_state|task_head)")  # files beside weights
SHARD = re.compile(r"^(?P<stem>.+)-\d{5}-of-(?P<total>\d{5})(?P<suffix>\.\w+)$")
WRAPPINGS = ("state_dict", "module", "model")  # keys under which training frameworks store the weights
CODE = re.compile(r"GLOBAL|Unsupported (global|class)|REDUCE|BUILD")  # in torch's refusal to unpickle an object


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint by name. Files are mapped, so that only tensors in use take memory.

    Args:
        path: A ``.safetensors``, ``.bin``, ``.pth`` or ``.pt`` file, or a folder with one such file or with numbered shards
            (with or without an index). If a folder has both kinds, the safetensors are read.

    Raises:
        FileNotFoundError: ``path`` or one of the shards does not exist.
        ValueError: A file is damaged, would run code when opened or holds other things than tensors; or the folder holds
            several checkpoints, or one name in two files.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint at {str(path)!r}")
    state: dict[str, Tensor] = {}
    for file in weight_files(path) if path.is_dir() else [path]:
        part = _read(file)
        if twice := sorted(state.keys() & part.keys()):
            raise ValueError(f"{str(path)!r} holds {twice[0]!r} in two files, the second is {file.name}; remove one of them")
        state |= part
    return state


def weight_files(folder: Path) -> list[Path]:
    """List the files of the one checkpoint in a folder.

    Raises:
        FileNotFoundError: The folder has no weights, or a shard is missing.
        ValueError: The folder holds several checkpoints, or its index cannot be read.
    """
    for suffixes in ((".safetensors",), PICKLES):
        files = [f for f in sorted(folder.iterdir()) if f.suffix in suffixes and not NOT_WEIGHTS.match(f.name)]
        indexes = [index for suffix in suffixes for index in sorted(folder.glob(f"*{suffix}.index.json"))]
        if len(indexes) > 1 or not indexes and len({SHARD.sub(r"\g<stem>", f.name) for f in files}) > 1:
            found = ", ".join(f.name for f in (indexes or files)[:6])
            raise ValueError(f"{str(folder)!r} holds several checkpoints ({found}); keep one, or name a file")
        if not indexes and not files:
            continue
        names = _indexed(indexes[0]) if indexes else _numbered(files[0].name)
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{len(missing)} of {len(names)} shards are missing in {str(folder)!r}: {', '.join(missing)}")
        return [folder / name for name in names]
    raise FileNotFoundError(f"no weights in {str(folder)!r}: neither *.safetensors nor {', '.join('*' + s for s in PICKLES)}")


def _indexed(index: Path) -> list[str]:
    """The names of the shards in an index file."""
    try:
        return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of shards ({type(error).__name__}); copy it again") from error


def _numbered(name: str) -> list[str]:
    """The names of all shards that must exist beside this one; a file without a number stands alone."""
    match = SHARD.match(name)
    if match is None:
        return [name]
    return [f"{match['stem']}-{n:05d}-of-{match['total']}{match['suffix']}" for n in range(1, int(match["total"]) + 1)]


def _read(file: Path) -> dict[str, Tensor]:
    """The tensors of one file."""
    if file.suffix not in (".safetensors", *PICKLES):
        raise ValueError(f"{str(file)!r} is no checkpoint; allowed: .safetensors, {', '.join(PICKLES)}, or a folder of them")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # damaged bytes can raise almost anything in safetensors, zipfile and pickle
        if CODE.search(str(error)):
            target = file.with_suffix(".safetensors").name
            raise ValueError(
                f"{str(file)!r} holds more than tensors, and opening it would run code from it; if you trust it, convert it: "
                f"safetensors.torch.save_file(torch.load({file.name!r}, weights_only=False), {target!r})"
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(f"{str(file)!r} is truncated or damaged ({reason}); download or copy it again") from error
    for name in WRAPPINGS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    entries = state if isinstance(state, Mapping) else {type(state).__name__: None}
    other = [str(name) for name, value in entries.items() if not isinstance(value, Tensor)]
    if other:
        raise ValueError(f"{str(file)!r} holds entries that are no named tensors ({other[0]}); save a state dict")
    return dict(entries)


@torch.no_grad()
def load_into(module: nn.Module, state: Mapping[str, Tensor], source: str, key: str) -> None:
    """Load all parameters and persistent buffers of a module. The module stays as it was unless everything fits.

    The module keeps its dtypes. A module on the meta device takes the tensors of ``state`` themselves (without a copy if the
    dtype is the same); any other module copies them. For tied weights, one of their names is enough.

    Args:
        module: The module that is loaded.
        state: Tensors by name.
        source: The checkpoint as the error message names it.
        key: The setting that the error message tells the user to correct.

    Raises:
        ValueError: Names are missing or unexpected, shapes differ, or weights that are tied in the module differ in
            ``state``. The message has one line and groups names by layer.
    """
    own = module.state_dict(keep_vars=True)
    tied: dict[int, list[str]] = {}
    for name, tensor in own.items():
        tied.setdefault(id(tensor), []).append(name)
    given = [[name for name in names if name in state] for names in tied.values()]
    missing = [name for names, found in zip(tied.values(), given, strict=True) if not found for name in names]
    shapes = {
        name: f"{name} is {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    }
    torn = {
        first: f"{first} and {other}"
        for first, *others in (sorted(found) for found in given if found)
        for other in others
        if not torch.equal(state[first], state[other])
    }
    faults = [
        _report("missing", {name: name for name in missing}),
        _report("unexpected", {name: name for name in state if name not in own}),
        _report("of another shape", shapes),
        _report("tied here but different there", {} if shapes else torn),
    ]
    kind = type(module).__name__
    if any(faults):
        raise ValueError(f"{source} does not fit {kind}: {'; '.join(filter(None, faults))}; correct {key}")
    unfilled = [name for name, buffer in module.named_buffers() if buffer.is_meta and name not in own]
    if unfilled:  # a buffer that no checkpoint holds
        raise ValueError(f"{kind} was built without memory, and {source} cannot fill {unfilled[0]}")
    loaded: dict[str, Tensor] = {}
    for names, found in zip(tied.values(), given, strict=True):
        target, value = own[names[0]], state[found[0]]
        value = value.to(target.dtype)
        if isinstance(target, nn.Parameter):  # one object for all names, so that tied weights stay tied
            value = nn.Parameter(value, requires_grad=target.requires_grad)
        loaded |= dict.fromkeys(names, value)
    module.load_state_dict(loaded, assign=any(tensor.is_meta for tensor in own.values()))


def _report(fault: str, names: Mapping[str, str], most: int = 6) -> str:
    """E.g. ``missing 36 of layers.*.self_attn (e.g. layers.0.self_attn.q_proj.weight), 2 of ...``; empty without names."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        groups.setdefault(group_of(name), []).append(name)
    parts = [f"{len(members)} of {group} (e.g. {names[members[0]]})" for group, members in groups.items()]
    more = [f"and {len(parts) - most} more groups"] if len(parts) > most else []
    return f"{fault} {', '.join(parts[:most] + more)}" if parts else ""


def group_of(name: str) -> str:
    """The group of a weight's name: all layers share the group of one part, e.g. ``layers.*.self_attn``."""
    parts = ["*" if part.isdigit() else part for part in name.split(".")]
    parts = parts[:-1] or parts
    return ".".join(parts[:-1] if "*" in parts[:-1] else parts)


def save_state(folder: str | Path, name: str, state: Mapping[str, Tensor]) -> Path:
    """Write a state dict to ``<folder>/<name>.safetensors``. The folder is created, tensors that share memory are copied."""
    file = Path(folder, f"{name}.safetensors")
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.detach().cpu().contiguous().clone() for key, value in state.items()}, file)
    return file
