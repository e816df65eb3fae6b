"""Where checkpoints are: a folder, a folder below ``UAE_CHECKPOINTS``, or a model id on the hub."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = "UAE_CHECKPOINTS"  # environment variable; a folder laid out like the hub: <root>/<owner>/<model>


def locate(name: str) -> str:
    """The folder (or file) that a name in a configuration means, or the name itself if it can only be a hub id.

    ``$UAE_CHECKPOINTS/<name>`` goes first, then a path that exists. So the same configuration runs from the hub, from a
    mirror on disk, and on tiny random stand-ins.

    Raises:
        FileNotFoundError: The name is written like a path, and nothing is there.
    """
    place = here(name)
    if place is not None:
        return str(place)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        mirror = os.environ.get(ROOT)
        below = f" or below {ROOT}={mirror}" if mirror else f" ({ROOT} is not set)"
        raise FileNotFoundError(f"nothing at {name!r}{below}; give a folder that exists or a hub id (owner/model)")
    return name


def local_folder(name: str, key: str) -> Path:
    """A checkpoint folder on this disk, for layouts that are read file by file; a hub id is downloaded (once).

    Raises:
        FileNotFoundError: It is not here and cannot be had from the hub; names ``key``.
    """
    import huggingface_hub

    place = here(name)
    if place is not None and place.is_dir():
        return place
    try:
        return Path(huggingface_hub.snapshot_download(name))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"checkpoint {name!r} is no folder here, not below {ROOT}, and cannot be had from the hub ({reason}); set {key}"
        ) from error


def local_file(name: str, key: str) -> Path:
    """A checkpoint file on this disk; ``owner/model/path`` of a hub repository is downloaded (once).

    Raises:
        FileNotFoundError: As `local_folder`.
    """
    import huggingface_hub

    place = here(name)
    if place is not None and place.is_file():
        return place
    owner, _, rest = name.partition("/")
    model, _, file = rest.partition("/")
    try:
        return Path(huggingface_hub.hf_hub_download(f"{owner}/{model}", file))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"checkpoint {name!r} is no file here, not below {ROOT}, and cannot be had from the hub ({reason}); set {key}"
        ) from error


def here(name: str) -> Path | None:
    """Where a name is on this disk: below the mirror, else as a path; None if it is not."""
    mirror = os.environ.get(ROOT)
    paths = (*([Path(mirror).expanduser() / name] if mirror else []), Path(name).expanduser())
    return next((path for path in paths if path.exists()), None)
