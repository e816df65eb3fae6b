"""Images of prompts, by any system, into a folder: any number of processes, interrupted and taken up again at will."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from uae.bench.arguments import run
from uae.bench.system import LoadedSystem, load
from uae.files.whole import write_whole
from uae.seeds import seed_of

RECORD = "drawn_by.json"  # in the folder: who drew it, so that no other system's images get mixed in


@dataclass(frozen=True)
class Drawing:
    """One image file.

    Args:
        path: Where it goes; the suffix is the format.
        prompt: What it shows.
        seeds: One for a picture; four, nine, ... for a square grid of pictures, row by row.
    """

    path: Path
    prompt: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class DrawingJob:
    """What a command wants drawn.

    Args:
        folder: Where to.
        drawings: All of them, also those that are there already.
        origin: What they are drawn from, as prompts and seed: a folder is of one origin and one system.
        batch_size: Pictures drawn at once.
        part: "i/n": this process draws the i-th of n shares, 1/n to n/n.
        device: Where to draw; None is the first GPU, or the CPU.
    """

    folder: Path
    drawings: Sequence[Drawing]
    origin: dict[str, Any]
    batch_size: int = 8
    part: str = "1/1"
    device: str | None = None


def seeds_of(seed: int, number: int | str, samples: int, first: int = 0) -> tuple[int, ...]:
    """The seeds of a prompt's pictures: they depend on its number (or name) and theirs, not on batches, parts or other prompts."""
    return tuple(seed_of(seed, "prompt", number, sample) for sample in range(first, first + samples))


def generate_command(name: str, describe: Callable[..., DrawingJob], words: Sequence[str]) -> None:
    """``generate`` of a benchmark: its own options describe the job, all others the system, as ``uae.cli`` takes them.

    Args:
        name: Of the benchmark.
        describe: Its parameters are the command's options.
        words: What the user typed behind ``generate``.
    """
    job, system = parse_job(f"{name} generate", describe, words, "draw with")
    draw_missing(load(system, job.device), job)


def parse_job(name: str, describe: Callable[..., Any], words: Sequence[str], purpose: str) -> tuple[Any, list[str]]:
    """A job from a command's own options, and the words that are the system's.

    Args:
        name: Of the command.
        describe: Makes the job; its parameters are the command's options.
        words: What the user typed behind the command.
        purpose: What the system is for, as the error says it.

    Raises:
        ValueError: No system is given.
    """
    own, system = split_options(words, {f"--{option}" for option in signature(describe).parameters})
    job = run(name, describe, own)
    if "--config" not in {word.partition("=")[0] for word in system}:
        raise ValueError(f"no system to {purpose}: give --config FILE, a complete run as configs/tiny.yaml")
    return job, system


def split_options(words: Sequence[str], options: set[str]) -> tuple[list[str], list[str]]:
    """The words that give one of ``options`` a value (or ask for help), and the others; in the order given."""
    own: list[str] = []
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        option, equals, _ = word.partition("=")
        mine = option in options or word in ("-h", "--help")
        (own if mine else others).append(word)
        if option in options and not equals:
            own.extend([value for value in [next(rest, None)] if value is not None])
    return own, others


def draw_missing(system: LoadedSystem, job: DrawingJob) -> None:
    """Draw what is missing; every file appears whole or not at all.

    Raises:
        ValueError: The folder holds another system's images, two drawings share a path, or ``part`` is none.
    """
    check_job(job)
    claim_folder(job.folder, {**system.identity, **job.origin})
    first, parts = parse_part(job.part)
    mine = list(job.drawings)[first::parts]
    missing = [drawing for drawing in mine if not drawing.path.is_file()]
    done = {drawing.path: [] for drawing in missing}  # type: dict[Path, list[Tensor]]
    rows = [(drawing, seed) for drawing in missing for seed in drawing.seeds]
    with tqdm(total=len(rows), unit="image", desc="drawing", disable=not rows) as bar:
        for batch in _batches(rows, job.batch_size):
            images_NCHW = _render(system, [drawing.prompt for drawing, _ in batch], [seed for _, seed in batch])
            for (drawing, _), image_CHW in zip(batch, images_NCHW, strict=True):
                done[drawing.path].append(image_CHW)
                if len(done[drawing.path]) == len(drawing.seeds):
                    save(done.pop(drawing.path), drawing.path)
            bar.update(len(batch))
    print(f"{len(missing)} images drawn, {len(mine) - len(missing)} were there: {job.folder}")


def check_job(job: DrawingJob) -> None:
    """Refuse what could only go wrong later.

    Raises:
        ValueError: As said there.
    """
    if job.batch_size < 1:
        raise ValueError(f"--batch_size {job.batch_size}: allowed: 1 or more")
    paths = [drawing.path for drawing in job.drawings]
    if not paths:
        raise ValueError("there is no prompt to draw: correct --prompts")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two prompts would be drawn to {str(twice)!r}: give every prompt a name of its own")
    parse_part(job.part)


def parse_part(part: str) -> tuple[int, int]:
    """``"2/8"`` as (1, 8).

    Raises:
        ValueError: It is not i/n with 1 <= i <= n.
    """
    i, _, n = part.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--part {part}: allowed: i/n with i from 1 to n, as 1/1 or 2/8")
    return int(i) - 1, int(n)


def claim_folder(folder: Path, identity: dict[str, Any], write: bool = True) -> None:
    """Write down who draws into a folder (unless ``write`` is off), or check that it is who drew before.

    Raises:
        ValueError: It was another system, or the same with other weights or settings.
    """
    record, written = folder / RECORD, json.dumps(identity, indent=2, sort_keys=True, default=str) + "\n"
    if not record.is_file():
        if not write:
            return
        write_whole(record, written.encode())
    before, now = (set(_leaves(json.loads(text)).items()) for text in (record.read_text(), written))
    if before != now:
        raise ValueError(
            f"{folder} holds images of another system or of other prompts (they differ in {min(before ^ now)[0]}, see {RECORD}): "
            "draw into another folder, or delete this one"
        )


def save(images: Sequence[Tensor], path: Path) -> None:
    """One picture, or a square grid of pictures row by row, each ``[3, H, W]`` in [0, 1], as a file."""
    from torchvision.transforms.functional import to_pil_image

    side = math.isqrt(len(images))
    if side * side != len(images):
        raise ValueError(f"{len(images)} pictures make no square grid; allowed: 1, 4, 9, ...")
    rows = [torch.cat(list(images[row * side : (row + 1) * side]), dim=2) for row in range(side)]
    picture = to_pil_image(torch.cat(rows, dim=1).float().clamp(0, 1).cpu())
    content = BytesIO()
    picture.save(content, format=Image.registered_extensions()[path.suffix.lower()])
    write_whole(path, content.getvalue())


@torch.no_grad()
def _render(system: LoadedSystem, prompts: list[str], seeds: list[int]) -> Tensor:
    with system.precision():
        return system.umm.renderer.render(system.umm.conditioner.encode(prompts), seeds)


def _batches(rows: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _leaves(node: Any, path: str = "") -> dict[str, str]:
    """Dotted key to value of everything in a nested configuration."""
    if isinstance(node, dict):
        return {key: value for name, inner in node.items() for key, value in _leaves(inner, f"{path}.{name}".strip(".")).items()}
    return {path: repr(node)}
