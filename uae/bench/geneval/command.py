"""GenEval (arXiv 2310.11513): do images show the objects, counts, colors and places that their prompts ask for?

python -m uae.bench geneval generate --prompts evaluation_metadata.jsonl --images DIR --config FILE [--ckpt_path FILE]
python -m uae.bench geneval score --prompts evaluation_metadata.jsonl --images DIR --output result.json
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from uae.bench.arguments import run
from uae.bench.fingerprints import sha256
from uae.bench.generate import Drawing, DrawingJob, generate_command, seeds_of
from uae.bench.geneval.colors import MODEL, WEIGHTS
from uae.bench.geneval.detection import DETECTOR
from uae.bench.geneval.detector import Detector, read_upright
from uae.bench.geneval.prompts import read_prompts, variant
from uae.bench.geneval.rules import TAGS, Detection, Verdict, judge
from uae.bench.ledger import Ledger
from uae.bench.result import Case, check_output, summarize, write_result
from uae.bench.score_table import score_table
from uae.bench.system import working_device

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class SampleImage:
    """One image to score.

    Args:
        number: Number of the prompt in its file, from 0.
        sample: Number of the image among those of the prompt, from 0.
        metadata: Line of the prompt file: ``tag``, ``include``, optionally ``exclude``, ``prompt``.
        name: Path of the image file, relative to the folder of images.
    """

    number: int
    sample: int
    metadata: dict[str, Any]
    name: str


def generate(
    prompts: str,
    images: str,
    samples: int = 4,
    seed: int = 0,
    batch_size: int = 8,
    part: str = "1/1",
    device: str | None = None,
) -> DrawingJob:
    """Draw prompts in GenEval's layout. All other options describe the system: --config FILE, --ckpt_path FILE, --key value.

    Images are DIR/00000/samples/0000.png beside DIR/00000/metadata.jsonl. Images that exist already are kept.

    Args:
        prompts: GenEval's evaluation_metadata.jsonl, or a file of the same form.
        images: Folder of the images.
        samples: Number of images per prompt.
        seed: Seed of the noise; each image's noise depends on its prompt and its number alone, not on the batch.
        batch_size: Number of images drawn at once.
        part: i/n draws only the i-th of n shares, for n processes at once.
        device: Name of the device; the default is the first GPU, or the CPU if there is none.
    """
    folder, listed = Path(images), read_prompts(prompts)
    drawings = [
        Drawing(folder / image.name, image.metadata["prompt"], seeds_of(seed, image.number, 1, first=image.sample))
        for image in sample_images(listed, samples)
    ]
    beside = {folder / f"{number:05d}" / METADATA: f"{json.dumps(row)}\n".encode() for number, row in enumerate(listed)}
    return DrawingJob(folder, drawings, {"seed": seed}, batch_size, part, device, beside)


def score_images(
    prompts: str,
    output: str,
    images: str | None = None,
    detections: str | None = None,
    samples: int = 4,
    system: str | None = None,
    detector: str = DETECTOR,
    color_model: str = MODEL,
    color_weights: str = WEIGHTS,
    device: str | None = None,
) -> dict[str, Any]:
    """Score images in GenEval's layout, or detections in them.

    Args:
        prompts: Prompt file that the images were drawn from.
        output: Result file, ending in .json; a file with a verdict per image (.images.jsonl) is written beside it.
        images: Folder of the images. Without it, the detections of an earlier run are scored.
        detections: File in which detections are kept (JSON Lines), so that no image is detected twice; the default lies beside
            the output.
        samples: Number of images per prompt. Missing images count as wrong.
        system: Name of the system that drew the images; the default is the name of their folder.
        detector: Mask2Former checkpoint of transformers with COCO's 80 categories.
        color_model: CLIP architecture of open_clip with QuickGELU.
        color_weights: Tag of the weights in open_clip, or a file.
        device: Name of the device; the default is the first GPU, or the CPU if there is none.
    """
    check_output(output)
    wanted = list(sample_images(read_prompts(prompts), samples))
    if images is None and detections is None:
        raise ValueError("nothing to score: give --images DIR, or --detections FILE of an earlier run")
    file = Path(detections) if detections else Path(output).with_suffix(".detections.jsonl")
    if images is None:
        kept, unreadable = Ledger(file), {image.name: "no detections" for image in wanted}
        unreadable = {name: reason for name, reason in unreadable.items() if name not in kept.rows}
    else:
        check_folder(wanted, Path(images))
        seeing = Detector(detector, color_model, color_weights, working_device(device))
        kept = Ledger(file, seeing.backend)
        unreadable = detect_all(wanted, Path(images), seeing, kept)
    verdicts = [_verdict(image, kept, unreadable) for image in wanted]
    name = system or (Path(images).resolve().name if images else file.stem)
    benchmark = f"{variant(prompts)} [{kept.header.get('name', 'unnamed detector')}]"
    cases = scored_cases(wanted, verdicts)
    result = write_result(
        output, benchmark, name, summarize(cases), kept.header, {"prompts": sha256(prompts)}, cases,
        not_seen=unreadable, not_scored=_extra(images, wanted),
    )  # fmt: skip
    rows = [_row(image, verdict) for image, verdict in zip(wanted, verdicts, strict=True)]
    Path(output).with_suffix(".images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(score_table(result, {"not seen, so wrong": list(unreadable), "not asked for": result["not_scored"]}))
    return result


def check_folder(images: Sequence[SampleImage], folder: Path) -> None:
    """Raise unless a folder holds images of these prompts.

    Raises:
        FileNotFoundError: The folder does not exist.
        ValueError: The images were drawn from other prompts.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {str(folder)!r} is no folder; draw one by geneval generate")
    for wanted in images:
        _check_metadata(folder / f"{wanted.number:05d}" / METADATA, wanted.metadata)


def detect_all(images: Sequence[SampleImage], folder: Path, detector: Detector, kept: Ledger) -> dict[str, str]:
    """Detect objects in every image that the ledger lacks.

    Returns:
        Name of each image that cannot be read, with the reason.
    """
    unreadable = {}
    for wanted in tqdm(images, unit="image", desc="detecting"):
        path = folder / wanted.name
        if not path.is_file():
            unreadable[wanted.name] = "missing"
            continue
        digest = sha256(path)
        before = kept.rows.get(wanted.name, {})
        if before.get("sha256") == digest and before.get("metadata") == wanted.metadata:
            continue
        try:
            image = read_upright(path)
        except (OSError, ValueError, SyntaxError) as error:
            unreadable[wanted.name] = f"{type(error).__name__}: {error}"
            continue
        kept.add(wanted.name, sha256=digest, metadata=wanted.metadata, objects=detector(image, wanted.metadata))
    return unreadable


def scored_cases(images: Sequence[SampleImage], verdicts: Sequence[Verdict]) -> dict[str, list[Case]]:
    """Name of each score to its cases, the benchmark's score first.

    ``overall`` is the mean of the tasks' accuracies over images; the images of a prompt are one cluster. ``prompts with a correct
    image`` is higher and must not be taken for the score.
    """
    tasks: dict[str, list[Case]] = {tag: [] for tag in TAGS}
    solved: dict[str, bool] = {}
    for image, verdict in zip(images, verdicts, strict=True):
        prompt, tag = f"{image.number:05d}", image.metadata["tag"]
        tasks[tag].append(Case(image.name, float(verdict.correct), prompt, tag))
        solved[prompt] = solved.get(prompt, False) or verdict.correct
    tasks = {tag: cases for tag, cases in tasks.items() if cases}
    everything = [case for cases in tasks.values() for case in cases]
    return {
        "overall": everything,
        **tasks,
        "correct images": [replace(case, group="") for case in everything],
        "prompts with a correct image": [Case(prompt, float(any_correct)) for prompt, any_correct in solved.items()],
    }


def _verdict(wanted: SampleImage, kept: Ledger, unreadable: dict[str, str]) -> Verdict:
    if wanted.name in unreadable:
        return Verdict(False, (f"not seen: {unreadable[wanted.name]}",))
    row = kept.rows[wanted.name]
    if row.get("metadata", wanted.metadata) != wanted.metadata:
        raise ValueError(f"the detections of {wanted.name} in {str(kept.path)!r} were made for another prompt; correct --prompts")
    found = {
        name: [Detection(tuple(one[:4]), one[4], one[5] if len(one) > 5 else None) for one in some]
        for name, some in row["objects"].items()
    }
    return judge(wanted.metadata, found)


def _row(wanted: SampleImage, verdict: Verdict) -> dict[str, Any]:
    """A line of GenEval's own results file."""
    prompt = {"filename": wanted.name, "tag": wanted.metadata["tag"], "prompt": wanted.metadata["prompt"]}
    return {**prompt, "correct": verdict.correct, "reason": "\n".join(verdict.reasons), "metadata": json.dumps(wanted.metadata)}


def sample_images(prompts: Sequence[dict[str, Any]], samples: int) -> Iterator[SampleImage]:
    """The images of all prompts, ``samples`` for each prompt."""
    if samples < 1:
        raise ValueError(f"--samples {samples}: allowed: 1 or more")
    for number, metadata in enumerate(prompts):
        for sample in range(samples):
            yield SampleImage(number, sample, metadata, f"{number:05d}/samples/{sample:04d}.png")


def _check_metadata(file: Path, metadata: dict[str, Any]) -> None:
    """Raise if the folder of a prompt's images holds the metadata of another prompt."""
    if file.is_file() and json.loads(file.read_text()) != metadata:
        raise ValueError(f"{file} is of another prompt than --prompts has there; give the file the images were drawn from")


def _extra(images: str | None, wanted: Sequence[SampleImage]) -> list[str]:
    """Images in the folder that are not scored: beyond the number of samples, or of prompts that the file does not hold."""
    if images is None:
        return []
    names = {file.relative_to(images).as_posix() for file in Path(images).glob("*/samples/*") if file.name[0] != "."}
    return sorted(names - {image.name for image in wanted})


def main(args: list[str]) -> None:
    """Run ``generate`` or ``score``."""
    if args[:1] == ["generate"]:
        generate_command("geneval", generate, args[1:])
    else:
        run("geneval", {"generate": generate, "score": score_images}, args)
