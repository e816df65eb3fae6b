"""Draw prompts into a folder with any system: on any number of processes, which may be stopped and started again at any time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from uae.bench.arguments import run
from uae.bench.system import LoadedSystem, load
from uae.files.whole import write_whole
from uae.seeds import seed_of

T = TypeVar("T")

RECORD = "drawn_by.json"  # in a folder of images: the system that drew them, so that no other system's images get mixed in


@dataclass(frozen=True)
class Drawing:
    """One image file to draw.

    Args:
        path: Path of the file; its suffix is the format.
        prompt: Prompt of the image.
        seeds: Seeds of the noise: one for a picture; four, nine, ... for a square grid of pictures, row by row.
    """

    path: Path
    prompt: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class DrawingJob:
    """All images that a benchmark needs.

    Args:
        folder: Folder of the images.
        drawings: All images, also those that exist already.
        origin: What the images are drawn from (prompts, seed): a folder holds images of one origin and one system.
        batch_size: Number of pictures drawn at once.
        part: "i/n": this process draws the i-th of n shares, 1/n to n/n.
        device: Name of the device; None is the first GPU, or the CPU if there is none.
    """

    folder: Path
    drawings: Sequence[Drawing]
    origin: dict[str, Any]
    batch_size: int = 8
    part: str = "1/1"
    device: str | None = None


def seeds_of(seed: int, number: int | str, samples: int, first: int = 0) -> tuple[int, ...]:
    """Seeds of a prompt's pictures. They depend on the prompt's number (or name) and the pictures' numbers alone, not on batches."""
    return tuple(seed_of(seed, "prompt", number, sample) for sample in range(first, first + samples))


def generate_command(name: str, describe: Callable[..., DrawingJob], words: Sequence[str]) -> None:
    """Run ``generate`` of a benchmark.

    Args:
        name: Name of the benchmark.
        describe: Makes the job; its parameters are the command's own options. All other options describe the system, as in
            ``python -m uae.cli predict``.
        words: The words that the user typed behind ``generate``.
    """
    job, system = parse_job(f"{name} generate", describe, words, "draw with")
    draw_missing(load(system, job.device), job)


def parse_job(name: str, describe: Callable[..., T], words: Sequence[str], purpose: str) -> tuple[T, list[str]]:
    """Make a job from a command's own options; the other words, which describe the system, are returned beside it.

    Args:
        name: Name of the command.
        describe: Makes the job; its parameters are the command's own options.
        words: The words that the user typed behind the command.
        purpose: What the command does with a system, for the error: "draw with", "run".

    Raises:
        ValueError: The words have no ``--config``, so no system is given.
    """
    own, system = split_options(words, {f"--{option}" for option in signature(describe).parameters})
    job = run(name, describe, own)
    if "--config" not in {word.partition("=")[0] for word in system}:
        raise ValueError(f"no system to {purpose}; give --config FILE, a complete run such as configs/tiny.yaml")
    return job, system


def split_options(words: Sequence[str], options: set[str]) -> tuple[list[str], list[str]]:
    """Split words into those that set one of ``options`` (or ask for help) and the others, each in the order given."""
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
    """Draw the images that do not exist yet; every file appears whole or not at all.

    Raises:
        ValueError: The folder holds another system's images, two drawings share a path, or ``part`` is not i/n.
    """
    check_job(job)
    claim_folder(job.folder, {**system.identity, **job.origin})
    first, parts = parse_part(job.part)
    mine = list(job.drawings)[first::parts]
    missing = [drawing for drawing in mine if not drawing.path.is_file()]
    done: dict[Path, list[Tensor]] = {drawing.path: [] for drawing in missing}
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
    """Raise before anything is loaded if a job cannot be drawn.

    Raises:
        ValueError: There is no prompt, two drawings share a path, or the batch size or the part is not allowed.
    """
    if job.batch_size < 1:
        raise ValueError(f"--batch_size {job.batch_size}: allowed: 1 or more")
    paths = [drawing.path for drawing in job.drawings]
    if not paths:
        raise ValueError("--prompts holds no prompt to draw; give a file or folder with prompts")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"two prompts would be drawn to {str(twice)!r}; give every prompt of --prompts a name of its own")
    parse_part(job.part)


def parse_part(part: str) -> tuple[int, int]:
    """The place of a share, from 0, and the number of shares: "2/8" is (1, 8).

    Raises:
        ValueError: The text is not i/n with 1 <= i <= n.
    """
    i, _, n = part.partition("/")
    if not (i.isdigit() and n.isdigit() and 1 <= int(i) <= int(n)):
        raise ValueError(f"--part {part}: allowed: i/n with i from 1 to n, as 1/1 or 2/8")
    return int(i) - 1, int(n)


def claim_folder(folder: Path, identity: dict[str, Any], write: bool = True) -> None:
    """Record in a folder which system draws into it, or check that the recorded system is the same.

    Args:
        folder: Folder of images.
        identity: System, settings and inputs that all images of the folder share.
        write: Whether to record the identity in a folder that has no record yet; False only checks.

    Raises:
        ValueError: The folder was drawn by another system, or by the same one with other weights or settings.
    """
    record, written = folder / RECORD, json.dumps(identity, indent=2, sort_keys=True, default=str) + "\n"
    if not record.is_file():
        if not write:
            return
        write_whole(record, written.encode())
    before, now = (set(_leaves(json.loads(text)).items()) for text in (record.read_text(), written))
    if before != now:
        raise ValueError(
            f"{folder} holds images of another system or of other prompts (they differ in {min(before ^ now)[0]}, see {RECORD}); "
            "draw into another folder, or delete this one"
        )


def save(images: Sequence[Tensor], path: Path) -> None:
    """Write one picture, or a square grid of pictures row by row, as a file. Pictures are ``[3, H, W]`` in [0, 1]."""
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


def _batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _leaves(node: object, path: str = "") -> dict[str, str]:
    """Dotted key to value of every entry of a nested configuration."""
    if isinstance(node, dict):
        return {key: value for name, inner in node.items() for key, value in _leaves(inner, f"{path}.{name}".strip(".")).items()}
    return {path: repr(node)}
