"""DPG-Bench (arXiv 2403.05135): do images show what dense prompts ask for, question by question?

python -m uae.bench dpg generate --prompts DIR --images DIR --config FILE [--ckpt_path FILE]
python -m uae.bench dpg score --csv dpg_bench.csv --images DIR --resolution 1024 --output result.json
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from uae.bench.arguments import run
from uae.bench.dpg.prompts import read_prompts
from uae.bench.dpg.rules import DPGScores, Item, Mode, read_questions, score_items
from uae.bench.dpg.visual_questions import MODEL, Answerer, TransformersAnswerer
from uae.bench.fingerprints import git_blob, sha256
from uae.bench.generate import Drawing, DrawingJob, generate_command, seeds_of
from uae.bench.geneval.detector import read_upright
from uae.bench.ledger import Ledger
from uae.bench.result import Case, Score, check_output, score, write_result
from uae.bench.score_table import score_table
from uae.bench.system import working_device
from uae.metrics.intervals import bootstrap

PUBLISHED = "98457fc9901943f51ff9a30367250fc292533bed"  # git blob of ELLA's dpg_bench.csv
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
TILES = 4

Answers = dict[str, list[dict[int, bool]]]  # item to one mapping per tile: number of the question to whether the answer is yes


def generate(
    prompts: str,
    images: str,
    tiles: int = TILES,
    seed: int = 0,
    batch_size: int = 8,
    part: str = "1/1",
    device: str | None = None,
) -> DrawingJob:
    """Draw prompts in DPG-Bench's layout. All other options describe the system: --config FILE, --ckpt_path FILE, --key value.

    Each prompt gets one grid of images, DIR/<name of the prompt file>.png. Grids that exist already are kept.

    Args:
        prompts: Folder of prompts, one .txt file each.
        images: Folder of the grids.
        tiles: Number of images in a grid: 1, 4, 9, ...
        seed: Seed of the noise; each image's noise depends on its prompt and its place in the grid alone, not on the batch.
        batch_size: Number of images drawn at once.
        part: i/n draws only the i-th of n shares, for n processes at once.
        device: Name of the device; the default is the first GPU, or the CPU if there is none.
    """
    _side(tiles)
    drawings = [
        Drawing(Path(images) / f"{name}.png", prompt, seeds_of(seed, name, tiles)) for name, prompt in read_prompts(prompts).items()
    ]
    return DrawingJob(Path(images), drawings, {"seed": seed, "tiles": tiles}, batch_size, part, device)


def score_images(
    csv: str,
    output: str,
    images: str | None = None,
    resolution: int | None = None,
    answers: str | None = None,
    mode: Mode = "fixed",
    tiles: int = TILES,
    vqa: str = MODEL,
    batch_size: int = 8,
    system: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Score grids of images in DPG-Bench's layout, or answers about them.

    Args:
        csv: File of the questions, dpg_bench.csv.
        output: Result file, ending in .json.
        images: Folder of the grids. Without it, the answers of an earlier run are scored.
        resolution: Side of a tile in pixels; needed with images.
        answers: File in which answers are kept (JSON Lines), so that no question is asked twice; the default lies beside the output.
        mode: "official" repeats the published script with its defects, "fixed" corrects them.
        tiles: Number of images in a grid: 1, 4, 9, ...
        vqa: Model that answers the questions: BLIP, or a vision-language model with a chat template.
        batch_size: Number of questions answered at once.
        system: Name of the system that drew the images; the default is the name of their folder.
        device: Name of the device; the default is the first GPU, or the CPU if there is none.
    """
    check_output(output)
    questions = read_questions(csv, mode)
    file = Path(answers) if answers else Path(output).with_suffix(".answers.jsonl")
    unreadable: dict[str, str] = {}
    if images is None:
        kept = Ledger(file)
        given = collect(questions, sorted({key.rsplit("/", 2)[0] for key in kept.rows}), kept, tiles)
    else:
        if resolution is None:
            raise ValueError("--resolution is missing; give the side of one tile of a grid, in pixels")
        grids = find_grids(Path(images), resolution, tiles)
        answerer = TransformersAnswerer(vqa, working_device(device), batch_size)
        kept = Ledger(file, answerer.backend)
        unreadable = ask_all(questions, grids, answerer, kept, tiles)
        given = collect(questions, [name for name in grids if name not in unreadable], kept, tiles)
    scores = score_items(questions, given, mode)
    published = "" if git_blob(csv) == PUBLISHED else " (own questions)"
    result = write_result(
        output,
        f"DPG-Bench{published} {mode} [{kept.header.get('name', 'unnamed model')}]",
        system or (Path(images).resolve().name if images else file.stem),
        summarize(scores),
        kept.header,
        {"questions": sha256(csv)},
        {"overall": [Case(name, value) for name, value in scores.items.items()]},
        dropped={**scores.dropped, **unreadable},
        items=scores.items,
    )
    print(score_table(result, {"without a score of their own": [f"{k}: {v}" for k, v in result["dropped"].items()]}))
    return result


def find_grids(folder: Path, resolution: int, tiles: int) -> dict[str, Path]:
    """Item to the file of its grid.

    Raises:
        FileNotFoundError: The folder does not exist or holds no image.
        ValueError: An item has two files, or a file has not the size of a grid, so that its tiles would be cut out wrongly.
    """
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not files:
        raise FileNotFoundError(f"--images {str(folder)!r} is no folder of images; draw one by dpg generate")
    grids: dict[str, Path] = {}
    size = (_side(tiles) * resolution,) * 2
    for file in files:
        name = file.stem  # what `generate` called it
        if name in grids:
            raise ValueError(f"{file.name} and {grids[name].name} are both of item {name}: delete one")
        try:
            with Image.open(file) as image:
                found = image.size
        except OSError:  # the file is reported and counted when it is read
            found = size
        if found != size:
            raise ValueError(
                f"{file} has {found[0]} x {found[1]} pixels, a grid of {tiles} tiles of --resolution {resolution} has "
                f"{size[0]} x {size[1]}; correct --resolution or --tiles"
            )
        grids[name] = file
    return grids


def ask_all(questions: Mapping[str, Item], grids: Mapping[str, Path], answerer: Answerer, kept: Ledger, tiles: int) -> dict[str, str]:
    """Ask all questions about every grid whose answers the ledger lacks.

    Returns:
        Item of each grid that cannot be read, with the reason.
    """
    unreadable = {}
    for name, file in tqdm(grids.items(), unit="prompt", desc="asking"):
        digest = sha256(file)
        try:
            cut = cut_tiles(read_upright(file), tiles)
        except (OSError, ValueError, SyntaxError) as error:
            unreadable[name] = f"{type(error).__name__}: {error}"
            continue
        for tile, image in enumerate(cut):
            numbers = [
                number for number, question in questions.get(name, {}).items()
                if not _answered(kept.rows.get(f"{name}/{tile}/{number}"), question.text, digest)
            ]  # fmt: skip
            texts = [questions[name][number].text for number in numbers]
            for number, text, answer in zip(numbers, texts, answerer(image, texts) if texts else (), strict=True):
                kept.add(f"{name}/{tile}/{number}", question=text, answer=answer, sha256=digest)
    return unreadable


def cut_tiles(image: Image.Image, tiles: int) -> list[Image.Image]:
    """Cut a square grid into its pictures, row by row."""
    side = _side(tiles)
    width, height = image.width // side, image.height // side
    places = [(column * width, row * height) for row in range(side) for column in range(side)]
    return [image.crop((left, top, left + width, top + height)) for left, top in places]


def collect(questions: Mapping[str, Item], names: Sequence[str], kept: Ledger, tiles: int) -> Answers:
    """The answers about some items, from the ledger. Every answer but "yes" counts as no.

    Raises:
        ValueError: Answers are missing, or belong to other questions.
    """
    missing, collected = [], {}
    for name in names:
        collected[name] = [dict.fromkeys(questions.get(name, {}), False) for _ in range(tiles)]
        for tile, answers in enumerate(collected[name]):
            for number in answers:
                row = kept.rows.get(f"{name}/{tile}/{number}")
                if row is None or row.get("question", questions[name][number].text) != questions[name][number].text:
                    missing.append(f"{name}/{tile}/{number}")
                else:
                    answers[number] = row["answer"] == "yes"
    if missing:
        raise ValueError(
            f"{str(kept.path)!r} lacks {len(missing)} answers ({', '.join(missing[:3])}, ...); continue with --images, or correct "
            "--csv or --tiles"
        )
    return collected


def summarize(scores: DPGScores) -> dict[str, Score]:
    """The score, then the broad categories (L1), then all categories (L2), with bootstrap intervals over items."""
    if not scores.items:
        raise ValueError("no item has a score: the images are named as no item of --csv")
    items_N = np.array(list(scores.items.values()))
    result = {"overall": score(bootstrap(items_N), len(items_N))}
    broad: dict[str, list[tuple[str, float]]] = {}
    for category, pairs in scores.categories.items():
        broad.setdefault(category.split("-")[0].strip(), []).extend(pairs)
    for level, groups in (("L1", broad), ("L2", scores.categories)):
        for category in sorted(groups):
            names, values = zip(*groups[category], strict=True)
            interval = bootstrap(np.array(values), clusters_N=np.array(names))
            result[f"{level} {category}"] = score(interval, len(values))
    return result


def _answered(row: Mapping[str, Any] | None, question: str, digest: str) -> bool:
    """Whether a row of the ledger answers this question about this image. Rows of other programs need not name the image."""
    return row is not None and row.get("question", question) == question and row.get("sha256", digest) == digest


def _side(tiles: int) -> int:
    side = math.isqrt(max(tiles, 0))
    if side < 1 or side * side != tiles:
        raise ValueError(f"--tiles {tiles}: a grid is square; allowed: 1, 4, 9, ...")
    return side


def main(args: list[str]) -> None:
    """Run ``generate`` or ``score``."""
    if args[:1] == ["generate"]:
        generate_command("dpg", generate, args[1:])
    else:
        run("dpg", {"generate": generate, "score": score_images}, args)
