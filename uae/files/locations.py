"""Where checkpoints are: a folder, a folder below ``UAE_CHECKPOINTS``, or a model id on the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

ROOT = "UAE_CHECKPOINTS"  # environment variable that names a mirror: a folder laid out as <owner>/<model>, like the hub


def locate(name: str) -> str:
    """The path that the name of a checkpoint means, or the name itself if it can only be a model id on the hub.

    ``$UAE_CHECKPOINTS/<name>`` is looked for first, then ``<name>`` as a path. So one configuration can run from the hub,
    from a mirror on the disk, and with tiny random stand-ins.

    Args:
        name: A folder, a file, or a model id ``owner/model``.

    Raises:
        FileNotFoundError: The name is written like a path, and nothing is there.
    """
    place = here(name)
    if place is not None:
        return str(place)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        mirror = _mirror()
        below = f" or below {ROOT}={mirror}" if mirror else f" ({ROOT} is not set)"
        raise FileNotFoundError(f"nothing at {name!r}{below}; give a folder that exists or a hub id (owner/model)")
    return name


def local_folder(name: str, key: str) -> Path:
    """The folder of a checkpoint on this disk, for checkpoints that are read file by file.

    Args:
        name: A folder, or a model id ``owner/model``, which is downloaded if it is not in the cache.
        key: The setting of the configuration that holds the name, for errors.

    Raises:
        FileNotFoundError: There is no such folder, and the hub does not provide it.
    """
    import huggingface_hub

    place = here(name)
    if place is not None and place.is_dir():
        return place
    return _downloaded(lambda: huggingface_hub.snapshot_download(name), f"checkpoint {name!r} is no folder", key)


def local_file(name: str, key: str) -> Path:
    """A single file of a checkpoint on this disk.

    Args:
        name: A file, or ``owner/model/path`` of a file on the hub, which is downloaded if it is not in the cache.
        key: The setting of the configuration that holds the name, for errors.

    Raises:
        FileNotFoundError: There is no such file, and the hub does not provide it.
    """
    import huggingface_hub

    place = here(name)
    if place is not None and place.is_file():
        return place
    owner, _, rest = name.partition("/")
    model, _, file = rest.partition("/")
    repository = f"{owner}/{model}"
    return _downloaded(lambda: huggingface_hub.hf_hub_download(repository, file), f"checkpoint {name!r} is no file", key)


def _downloaded(download: Callable[[], str], problem: str, key: str) -> Path:
    try:
        return Path(download())
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{problem} here, not below {ROOT}, and cannot be had from the hub ({reason}); set {key}") from error


def here(name: str) -> Path | None:
    """The path that a name means on this disk: below ``UAE_CHECKPOINTS`` or else as it is; None if there is neither."""
    mirror = _mirror()
    paths = (*([Path(mirror).expanduser() / name] if mirror else []), Path(name).expanduser())
    return next((path for path in paths if path.exists()), None)


def _mirror() -> str | None:
    mirror = os.environ.get(ROOT)
    if mirror is not None and not mirror.strip():  # a typo in ROOT=$FOLDER must not download what is on this disk
        raise ValueError(f"the environment variable {ROOT} is empty: give it a value, or unset it")
    return mirror
