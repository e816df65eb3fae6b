"""GenEval: do images show the objects, counts, colors and places that their prompts ask for?

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
from uae.files.whole import write_whole

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class SampleImage:
    """One image to score.

    Args:
        number: Of its prompt, from 0.
        sample: Its number among the prompt's images, from 0.
        metadata: The prompt's line.
        name: Of the file, relative to the folder of images.
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
    """Draw prompts in GenEval's layout. Other options are the system's: --config FILE, --ckpt_path FILE, --key value.

    DIR/00000/samples/0000.png beside DIR/00000/metadata.jsonl; what is drawn already stays.

    Args:
        prompts: GenEval's evaluation_metadata.jsonl, or a file like it.
        images: Folder to draw to.
        samples: Images per prompt.
        seed: Of the noise; every image has its own, whatever the batch.
        batch_size: Images drawn at once.
        part: i/n: draw only the i-th of n shares, for n processes at once.
        device: Where to draw; the default is the first GPU, or the CPU.
    """
    folder, listed = Path(images), read_prompts(prompts)
    for case in _cases(listed, 1):
        file = folder / f"{case.number:05d}" / METADATA
        _check_metadata(file, case.metadata)
        write_whole(file, f"{json.dumps(case.metadata)}\n".encode())
    drawings = [
        Drawing(folder / case.name, case.metadata["prompt"], seeds_of(seed, case.number, 1, first=case.sample))
        for case in _cases(listed, samples)
    ]
    return DrawingJob(folder, drawings, {"prompts": sha256(prompts), "seed": seed}, batch_size, part, device)


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
        prompts: The file the images were drawn from.
        output: The result, a JSON file; verdicts per image are written beside it.
        images: Folder of the images. Without it, the detections are scored as they are.
        detections: File that detections are kept in (JSONL); the default is beside the output. With it nothing is
            detected twice.
        samples: Images per prompt. Missing ones count as wrong.
        system: Name of what drew the images; the default is their folder's.
        detector: Mask2Former of transformers, with COCO's 80 categories.
        color_model: CLIP of open_clip, with QuickGELU.
        color_weights: Its tag, or a file.
        device: Where models work; the default is the first GPU, or the CPU.
    """
    check_output(output)
    cases = list(_cases(read_prompts(prompts), samples))
    if images is None and detections is None:
        raise ValueError("nothing to score: give --images DIR, or --detections FILE of an earlier run")
    file = Path(detections) if detections else Path(output).with_suffix(".detections.jsonl")
    if images is None:
        kept, unreadable = Ledger(file), {case.name: "no detections" for case in cases}
        unreadable = {name: reason for name, reason in unreadable.items() if name not in kept.rows}
    else:
        check_folder(cases, Path(images))
        seeing = Detector(detector, color_model, color_weights, working_device(device))
        kept = Ledger(file, seeing.backend)
        unreadable = detect_all(cases, Path(images), seeing, kept)
    verdicts = [_verdict(case, kept, unreadable) for case in cases]
    name = system or (Path(images).resolve().name if images else file.stem)
    benchmark = f"{variant(prompts)} [{kept.header.get('name', 'unnamed detector')}]"
    scored = scored_cases(cases, verdicts)
    result = write_result(
        output, benchmark, name, summarize(scored), kept.header, {"prompts": sha256(prompts)}, scored,
        not_seen=unreadable, not_scored=_extra(images, cases),
    )  # fmt: skip
    rows = [_row(case, verdict) for case, verdict in zip(cases, verdicts, strict=True)]
    Path(output).with_suffix(".images.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(score_table(result, {"not seen, so wrong": list(unreadable), "not asked for": result["not_scored"]}))
    return result


def check_folder(cases: Sequence[SampleImage], folder: Path) -> None:
    """Raise unless a folder may hold the images of these prompts.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It was drawn from other prompts.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {str(folder)!r} is no folder; draw one by geneval generate")
    for case in cases:
        _check_metadata(folder / f"{case.number:05d}" / METADATA, case.metadata)


def detect_all(cases: Sequence[SampleImage], folder: Path, detector: Detector, kept: Ledger) -> dict[str, str]:
    """Put the detections of every image into the ledger that are not there; the images that cannot be read, and why."""
    unreadable = {}
    for case in tqdm(cases, unit="image", desc="detecting"):
        path = folder / case.name
        if not path.is_file():
            unreadable[case.name] = "missing"
            continue
        digest = sha256(path)
        before = kept.rows.get(case.name, {})
        if before.get("sha256") == digest and before.get("metadata") == case.metadata:
            continue
        try:
            image = read_upright(path)
        except (OSError, ValueError, SyntaxError) as error:
            unreadable[case.name] = f"{type(error).__name__}: {error}"
            continue
        kept.add(case.name, sha256=digest, metadata=case.metadata, objects=detector(image, case.metadata))
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


def _verdict(case: SampleImage, kept: Ledger, unreadable: dict[str, str]) -> Verdict:
    if case.name in unreadable:
        return Verdict(False, (f"not seen: {unreadable[case.name]}",))
    row = kept.rows[case.name]
    if row.get("metadata", case.metadata) != case.metadata:
        raise ValueError(f"the detections of {case.name} in {str(kept.path)!r} were made for another prompt; correct --prompts")
    found = {
        name: [Detection(tuple(one[:4]), one[4], one[5] if len(one) > 5 else None) for one in some]
        for name, some in row["objects"].items()
    }
    return judge(case.metadata, found)


def _row(case: SampleImage, verdict: Verdict) -> dict[str, Any]:
    """One line of the official results file."""
    prompt = {"filename": case.name, "tag": case.metadata["tag"], "prompt": case.metadata["prompt"]}
    return {**prompt, "correct": verdict.correct, "reason": "\n".join(verdict.reasons), "metadata": json.dumps(case.metadata)}


def _cases(prompts: Sequence[dict[str, Any]], samples: int) -> Iterator[SampleImage]:
    if samples < 1:
        raise ValueError(f"--samples {samples}: allowed: 1 or more")
    for number, metadata in enumerate(prompts):
        for sample in range(samples):
            yield SampleImage(number, sample, metadata, f"{number:05d}/samples/{sample:04d}.png")


def _check_metadata(file: Path, metadata: dict[str, Any]) -> None:
    """Raise if a folder of images says that it shows another prompt."""
    if file.is_file() and json.loads(file.read_text()) != metadata:
        raise ValueError(f"{file} is of another prompt than --prompts has there; give the file the images were drawn from")


def _extra(images: str | None, cases: Sequence[SampleImage]) -> list[str]:
    """Images in the layout that nobody asked for: samples beyond the number, prompts beyond the file."""
    if images is None:
        return []
    names = {file.relative_to(images).as_posix() for file in Path(images).glob("*/samples/*") if file.name[0] != "."}
    return sorted(names - {case.name for case in cases})


def main(args: list[str]) -> None:
    """``generate`` or ``score``."""
    if args[:1] == ["generate"]:
        generate_command("geneval", generate, args[1:])
    else:
        run("geneval", {"generate": generate, "score": score_images}, args)
