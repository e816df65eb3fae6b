"""The stand-ins by the names of the released checkpoints, and the function that writes them to disk."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

MARK = "rehearsal.json"  # in every folder written here: the digest of the code that wrote it, and its files

PIPELINE_NAMES = {
    "stabilityai/stable-diffusion-3.5-medium": "sd3",
    "stabilityai/stable-diffusion-3.5-large": "sd3",
    "black-forest-labs/FLUX.1-dev": "flux",
    "Efficient-Large-Model/Sana_600M_512px_diffusers": "sana",
    "Efficient-Large-Model/Sana_1600M_512px_diffusers": "sana",
    "Qwen/Qwen-Image": "qwen_image",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Shitao/OmniGen-v1-diffusers": "omnigen",
}


def catalog() -> dict[str, Callable[[Path], None]]:
    """Name of each stand-in to the function that writes it into a folder."""
    from uae.rehearsal.bagel import BAGEL
    from uae.rehearsal.emu3 import EMU3
    from uae.rehearsal.encoders import ENCODERS
    from uae.rehearsal.janus import JANUS
    from uae.rehearsal.language_models import LANGUAGE_MODELS
    from uae.rehearsal.layouts import LAYOUTS
    from uae.rehearsal.omnigen2 import OMNIGEN2
    from uae.rehearsal.pipelines import PIPELINES
    from uae.rehearsal.rewards import REWARDS
    from uae.rehearsal.x_omni import X_OMNI

    pipelines = {name: PIPELINES[kind] for name, kind in PIPELINE_NAMES.items()}
    return {**LAYOUTS, **LANGUAGE_MODELS, **JANUS, **EMU3, **X_OMNI, **BAGEL, **OMNIGEN2, **pipelines, **ENCODERS, **REWARDS}


def write(folder: Path, only: Sequence[str] | None = None, say: Callable[[str], None] = lambda line: None) -> None:
    """Write the stand-ins that do not exist yet. An incomplete stand-in never appears under its name.

    Args:
        folder: Folder of the stand-ins; `uae.files.locations.locate` finds them if ``UAE_CHECKPOINTS`` is this folder.
        only: Names of stand-ins to write; None writes all.
        say: Function that is called with one line of text per stand-in.

    Raises:
        ValueError: There is no stand-in of a name in ``only``.
        FileExistsError: A folder of that name has files that this function did not write, perhaps the real checkpoint.
    """
    import torch

    writers = catalog()
    unknown = sorted(set(only or ()) - set(writers))
    if unknown:
        raise ValueError(f"--only {' '.join(unknown)}: no such stand-in; there are {', '.join(writers)}")
    digest = _digest()
    for number, name in enumerate(only or writers, start=1):
        there = complete(folder / name, digest)
        if not there:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                _write(folder / name, writers[name], digest)
        size = sum(file.stat().st_size for file in _files(folder / name)) / 1e6
        say(f"[{number}/{len(only or writers)}] {name}: {size:.1f} MB{' (was there)' if there else ''}")


def complete(target: Path, digest: str | None = None) -> bool:
    """Whether a folder is as the current code writes it: all files exist and have their original sizes.

    Args:
        target: Folder of one stand-in.
        digest: Digest of the code; None computes it.
    """
    return _mark(target) == {"digest": digest or _digest(), "files": _sizes(target)}


def _mark(target: Path) -> dict[str, Any]:
    mark = target / MARK
    return json.loads(mark.read_text()) if mark.is_file() else {"digest": "", "files": {}}


def _write(target: Path, writer: Callable[[Path], None], digest: str) -> None:
    listed = _mark(target)["files"]
    foreign = [name for name, size in _sizes(target).items() if size > listed.get(name, -1)]
    if foreign:  # perhaps a real checkpoint, possibly copied over a stand-in
        raise FileExistsError(f"{target / foreign[0]} was not written by this command and stays; give another FOLDER")
    partial = target.with_name(f".{target.name}.partial")
    for remains in (partial, target):
        shutil.rmtree(remains, ignore_errors=True)
    partial.mkdir(parents=True)
    writer(partial)
    (partial / MARK).write_text(json.dumps({"digest": digest, "files": _sizes(partial)}, indent=1))
    partial.rename(target)


def _sizes(target: Path) -> dict[str, int]:
    return {str(file.relative_to(target)): file.stat().st_size for file in _files(target) if file.name != MARK}


def _files(target: Path) -> Iterable[Path]:
    return sorted(file for file in target.rglob("*") if file.is_file())


def _digest() -> str:
    """SHA-256 of the code of this package. Folders that other code wrote are written again."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
