"""Pairs sources and reconstructions: as recorded, or else by name, as the official scripts do, if one file alone fits."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from callbacks.predictions import CAPTIONS, finished
from uae.bench.fingerprints import sha256
from uae.bench.output_folder import SOURCE
from uae.data.folder import list_images
from uae.files.folders import shown

PREFIX = "recon_"
Key = Callable[[PurePosixPath], str]


@dataclass
class Pairs:
    """The files of two folders, by their names relative to the folders.

    Args:
        matched: Source to its reconstruction, ordered by source.
        unmatched_sources: Sources without a reconstruction.
        unmatched_reconstructions: Reconstructions without a source.
        ambiguous: Files of either folder that could be paired in several ways, with their candidates.
        changed: Sources that are other files now than when their reconstructions were made.
    """

    matched: dict[str, str] = field(default_factory=dict)
    unmatched_sources: list[str] = field(default_factory=list)
    unmatched_reconstructions: list[str] = field(default_factory=list)
    ambiguous: dict[str, list[str]] = field(default_factory=dict)
    changed: list[str] = field(default_factory=list)


def _whole(name: PurePosixPath) -> str:
    return str(name)


def _appended(name: PurePosixPath) -> str:
    """``a.jpg`` became ``a.jpg.png``."""
    return str(name.with_suffix("")) if len(name.suffixes) > 1 else str(name)


def _stem(name: PurePosixPath) -> str:
    return str(name.with_suffix(""))


def _without_prefix(name: PurePosixPath) -> str:
    return str(name.with_name(name.stem.removeprefix(PREFIX)))


def _bare(name: PurePosixPath) -> str:
    return name.stem.removeprefix(PREFIX)


# The name of a source and the name of its reconstruction are made equal by these functions, most certain first.
RULES: tuple[tuple[Key, Key], ...] = (
    (_whole, _whole),
    (_whole, _appended),
    (_stem, _stem),
    (_stem, _without_prefix),
    (lambda name: name.stem, _bare),  # in any subfolders
)


def pair(sources: str | Path, reconstructions: str | Path) -> Pairs:
    """Pair the images of two folders.

    What is recorded beside the reconstructions is taken as it is. Rules for all others, most certain first: equal relative
    names; the source's name with another suffix appended (``a.jpg.png``); equal stems (``a.png`` for ``a.jpg``); ``recon_``
    before the stem; the last two in any subfolder. Each rule applies to the files that the rules before it left over. Files that
    one rule would pair in several ways are reported as ambiguous.

    Raises:
        FileNotFoundError: A folder does not exist or holds no image.
    """
    left = [PurePosixPath(name) for name in list_images(sources, "sources")]
    right = [PurePosixPath(name) for name in list_images(reconstructions, "reconstructions")]
    pairs = Pairs()
    known, there = recorded(Path(reconstructions).expanduser()), (set(map(str, left)), set(map(str, right)))
    files = {shown(name): name for name in there[0]}  # rows have names that can be written
    for name, row in known.items():
        source = files.get(name)
        if source is not None and row["reconstruction"] in there[1]:
            pairs.matched[source] = row["reconstruction"]
            if SOURCE in row and row[SOURCE] != sha256(Path(sources).expanduser() / source):
                pairs.changed.append(source)
    left = [name for name in left if str(name) not in pairs.matched]
    taken = set(pairs.matched.values())
    right = [name for name in right if str(name) not in taken]
    for source_key, reconstruction_key in RULES:
        met: tuple[set[PurePosixPath], set[PurePosixPath]] = (set(), set())
        for ours, theirs in _alike((left, source_key), (right, reconstruction_key)):
            met[0].update(ours)
            met[1].update(theirs)
            if len(ours) == len(theirs) == 1:
                pairs.matched[str(ours[0])] = str(theirs[0])
            else:
                pairs.ambiguous |= {f"sources/{name}": [str(other) for other in theirs] for name in ours}
                pairs.ambiguous |= {f"reconstructions/{name}": [str(other) for other in ours] for name in theirs}
        left = [name for name in left if name not in met[0]]
        right = [name for name in right if name not in met[1]]
    pairs.matched = {source: file for source, file in sorted(pairs.matched.items()) if source not in pairs.changed}
    pairs.unmatched_sources = [str(name) for name in left]
    pairs.unmatched_reconstructions = [str(name) for name in right]
    return pairs


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    """Source to its row of captions, as ``bench run`` and ``predict`` write them; nothing in a folder of another program."""
    try:
        rows = json.loads((folder / CAPTIONS).read_text(encoding="utf-8"))
        found = {str(row["name"]): dict(row) for row in rows if isinstance(row["reconstruction"], str)}
    except (OSError, ValueError, KeyError, TypeError):
        found = {}
    return found | finished(folder)  # the rows of a run that is not complete yet


def _alike(*sides: tuple[list[PurePosixPath], Key]) -> list[tuple[list[PurePosixPath], list[PurePosixPath]]]:
    """Groups of names that have the same key, with the names of each side."""
    groups: dict[str, tuple[list[PurePosixPath], list[PurePosixPath]]] = defaultdict(lambda: ([], []))
    for side, (names, key) in enumerate(sides):
        for name in names:
            groups[key(name)][side].append(name)
    return [both for both in groups.values() if all(both)]
