"""A folder that several calls of a command write into: whose it is, and what becomes of files whose source is gone."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from uae.files.whole import write_whole

RECORD = "drawn_by.json"  # in a folder of images: the system that drew them, so that no other system's images get mixed in
ASIDE = ".gone"  # in the same folder: files whose source is gone; being hidden, they are neither listed nor scored
SOURCE = "source_sha256"  # key of a row of captions: the content of the source that the reconstruction is of
WEIGHTS = "weights"  # key of an identity, see `uae.bench.fingerprints.checkpoints`


def claim_folder(folder: Path, identity: dict[str, Any], outputs: Iterable[Path], write: bool = True) -> None:
    """Record in a folder which system draws into it, or check that the recorded system is the same.

    Args:
        folder: Folder of images.
        identity: System, weights and settings that all images of the folder share.
        outputs: The files that the command will write. Without a record, nobody knows who has made the ones that exist.
        write: Whether to record the identity in a folder that has no record yet. False only checks, before weights are loaded;
            checkpoints that are not downloaded yet are then not compared.

    Raises:
        ValueError: The folder was drawn by another system, by the same one with other weights or settings, or by an unknown one.
    """
    record, written = folder / RECORD, json.dumps(identity, indent=2, sort_keys=True, default=str) + "\n"
    if not record.is_file():
        if strange := next((path for path in outputs if path.exists()), None):
            raise ValueError(
                f"{strange} exists, but {folder} has no {RECORD} that says which system made it; write into another folder, or move "
                "its files away"
            )
        if not write:
            return
        write_whole(record, written.encode())
    before, now = (_leaves(json.loads(text)) for text in (record.read_text(), written))
    differing = {key for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
    if not write:
        differing -= {key for key in before.keys() - now.keys() if key.startswith(f"{WEIGHTS}.")}
    if differing:
        raise ValueError(
            f"{folder} holds images of another system or of other settings (they differ in {min(differing)}, see {RECORD}); "
            "draw into another folder, or delete this one"
        )


def check_beside(sources: str | Path, output: str | Path) -> Path:
    """The resolved folder of the sources, which must not be in the output folder, nor hold it.

    Raises:
        ValueError: One folder is in the other, so that outputs would be taken for sources.
    """
    source, target = Path(sources).expanduser().resolve(), Path(output).resolve()
    if source == target or source in target.parents or target in source.parents:
        raise ValueError(f"--output {str(output)!r} and --sources {str(sources)!r} are in each other; correct --output")
    return source


def set_aside(folder: Path, files: Iterable[Path]) -> None:
    """Move files of a folder into its hidden folder `ASIDE`, under the same names; processes may do so at the same time."""
    for file in files:
        target = folder / ASIDE / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            file.replace(target)
        except FileNotFoundError:  # another process was faster
            continue


def _leaves(node: object, path: str = "") -> dict[str, str]:
    """Dotted key to value of every entry of a nested configuration."""
    if isinstance(node, dict):
        return {key: value for name, inner in node.items() for key, value in _leaves(inner, f"{path}.{name}".strip(".")).items()}
    return {path: repr(node)}
