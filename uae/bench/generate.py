"""Draw prompts into a folder with any system: on any number of processes, which may be stopped and started again at any time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor
from tqdm import tqdm

from uae.bench.arguments import run
from uae.bench.output_folder import ASIDE, claim_folder, set_aside
from uae.bench.system import LoadedSystem, load
from uae.files.whole import write_whole
from uae.seeds import seed_of

T = TypeVar("T")

PROMPT = "prompt"  # text in a PNG file: what the image was drawn from


@dataclass(frozen=True)
class Drawing:
    """One image file to draw.

    Args:
        path: Path of the file, a PNG, which also holds the prompt.
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
        origin: Settings that all images share (seed): a folder holds images of one origin and one system.
        beside: Content of further files that belong to the prompts.
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
    beside: Mapping[Path, bytes] = field(default_factory=dict)


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
    """Draw the images that do not exist yet, or were drawn from another prompt; every file appears whole or not at all.

    Raises:
        ValueError: The folder holds another system's images or those of another prompt file, two drawings share a path, or ``part``
            is not i/n.
    """
    check_job(job)
    claim_folder(job.folder, {**system.identity, **job.origin}, [drawing.path for drawing in job.drawings])
    drawn, gone = drawn_prompts(job)
    set_gone_aside(job.folder, gone)
    for path, content in job.beside.items():
        write_whole(path, content)
    first, parts = parse_part(job.part)
    mine = list(job.drawings)[first::parts]
    missing = [drawing for drawing in mine if drawn.get(drawing.path) != drawing.prompt]
    changed = sum(drawing.path in drawn for drawing in missing)
    done: dict[Path, list[Tensor]] = {drawing.path: [] for drawing in missing}
    rows = [(drawing, seed) for drawing in missing for seed in drawing.seeds]
    with tqdm(total=len(rows), unit="image", desc="drawing", disable=not rows) as bar:
        for batch in _batches(rows, job.batch_size):
            images_NCHW = _render(system, [drawing.prompt for drawing, _ in batch], [seed for _, seed in batch])
            for (drawing, _), image_CHW in zip(batch, images_NCHW, strict=True):
                done[drawing.path].append(image_CHW)
                if len(done[drawing.path]) == len(drawing.seeds):
                    save(done.pop(drawing.path), drawing.path, drawing.prompt)
            bar.update(len(batch))
    again = f" ({changed} again, since their prompts have changed)" if changed else ""
    print(f"{len(missing)} images drawn{again}, {len(mine) - len(missing)} were there: {job.folder}")


def drawn_prompts(job: DrawingJob) -> tuple[dict[Path, str | None], list[Path]]:
    """The prompt that each image of a job was drawn from, for those that exist, and the images of prompts that are gone.

    Raises:
        ValueError: None of the images was drawn from its prompt, so the prompts are of another file.
    """
    asked = {drawing.path: drawing.prompt for drawing in job.drawings}
    drawn = {path: prompt_of(path) for path in job.folder.rglob("[!.]*.png") if ASIDE not in path.parts}
    there = {path: prompt for path, prompt in drawn.items() if path in asked}
    if there and not any(asked[path] == prompt for path, prompt in there.items()):
        path, prompt = next(iter(there.items()))
        raise ValueError(
            f"{job.folder} holds images of other prompts ({path} of {prompt!r}, asked for is {asked[path]!r}); draw into "
            "another folder, or delete this one"
        )
    prompts = set(asked.values())
    return there, [path for path, prompt in drawn.items() if path not in asked and prompt is not None and prompt not in prompts]


def set_gone_aside(folder: Path, gone: Sequence[Path]) -> None:
    """Move images of prompts that are gone into the hidden folder of a folder, and say so."""
    if gone:
        set_aside(folder, gone)
        print(f"{len(gone)} images moved to {folder / ASIDE}, since their prompts are gone (first: {gone[0].name})")


def prompt_of(path: Path) -> str | None:
    """The prompt that `save` wrote into an image; None if there is none, or the file cannot be read."""
    try:
        with Image.open(path) as image:
            return image.info.get(PROMPT)
    except (OSError, ValueError, SyntaxError):
        return None


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


def save(images: Sequence[Tensor], path: Path, prompt: str = "") -> None:
    """Write one picture, or a square grid of pictures row by row, as a PNG file that also holds their prompt.

    Args:
        images: Pictures ``[3, H, W]`` in [0, 1].
        path: Path of the file.
        prompt: What the pictures were drawn from.
    """
    from torchvision.transforms.functional import to_pil_image

    side = math.isqrt(len(images))
    if side * side != len(images):
        raise ValueError(f"{len(images)} pictures make no square grid; allowed: 1, 4, 9, ...")
    rows = [torch.cat(list(images[row * side : (row + 1) * side]), dim=2) for row in range(side)]
    write_whole(path, png(to_pil_image(torch.cat(rows, dim=1).float().clamp(0, 1).cpu()), prompt))


def png(picture: Image.Image, prompt: str) -> bytes:
    """The content of a PNG file that also holds the prompt which the picture was drawn from."""
    content, about = BytesIO(), PngInfo()
    about.add_itxt(PROMPT, prompt)
    picture.save(content, format="PNG", pnginfo=about)
    return content.getvalue()


@torch.no_grad()
def _render(system: LoadedSystem, prompts: list[str], seeds: list[int]) -> Tensor:
    with system.precision():
        return system.umm.renderer.render(system.umm.conditioner.encode(prompts), seeds)


def _batches(rows: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))
