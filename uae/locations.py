"""Where checkpoints are: a folder, a folder below ``UAE_CHECKPOINTS``, or a model id on the hub."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = "UAE_CHECKPOINTS"  # environment variable; a folder laid out like the hub: <root>/<owner>/<model>


def locate(name: str) -> str:
    """The folder (or file) that a name in a configuration means, or the name itself if it can only be a hub id.

    A path that exists goes first, then ``$UAE_CHECKPOINTS/<name>``. So the same configuration runs from the hub, from a
    mirror on disk, and on tiny random stand-ins.

    Raises:
        FileNotFoundError: The name is written like a path, and nothing is there.
    """
    mirror = os.environ.get(ROOT)
    for path in (Path(name).expanduser(), *([Path(mirror).expanduser() / name] if mirror else [])):
        if path.exists():
            return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        below = f" or below {ROOT}={mirror}" if mirror else f" ({ROOT} is not set)"
        raise FileNotFoundError(f"nothing at {name!r}{below}; give a folder that exists or a hub id (owner/model)")
    return name
