"""``python -m uae.bench geneval_plus generate|run|score``: a judge decides whether images show all that longer prompts ask for.

The rules are those of GenEval++ (arXiv 2508.09987): one image per prompt, named after the prompt's line; a language model judges
whether the image meets every requirement and looks like a photograph; the score is the mean over tags. The instruction of the
judge is worded anew here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from uae.bench.arguments import Function
from uae.bench.arguments import run as run_command
from uae.bench.fingerprints import sha256
from uae.bench.generate import Drawing, DrawingJob, generate_command, seeds_of
from uae.bench.judging.judges import Judge, read_judges
from uae.bench.judging.prompt import Prompt, read_prompt
from uae.bench.judging.requests import JudgeRequest, JudgingPlan, image_digest, judge_request, read_plan, write_plan
from uae.bench.judging.stages import ask, open_cache, status
from uae.bench.result import Case, by_group, check_output, summarize, write_result
from uae.bench.score_table import score_table
from uae.files.lines import lines_of, text_of
from uae.files.packaged import configuration

BENCHMARK = "geneval_plus"
JUDGE = "configs/bench/judges/gpt_4_1.yaml"
PROMPT = "configs/bench/judges/prompts/geneval_plus.yaml"
FETCH = "Geneval++.jsonl of github.com/yejy53/Echo-4o, folder test_scripts"
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
REGIONS = {"left": "in the left half", "right": "in the right half", "above": "in the upper half", "below": "in the lower half"}
SIZES = {"larger": "clearly larger than the other objects", "smaller": "clearly smaller than the other objects"}
FAILED = -1  # verdict of an image about which the judge gave no usable answer; it counts as wrong


def generate(
    prompts: str, images: str, seed: int = 0, batch_size: int = 8, part: str = "1/1", device: str | None = None
) -> DrawingJob:
    """Draw one image per prompt: DIR/1.png belongs to the first line of the file.

    All other options describe the system, as behind ``python -m uae.cli predict``: --config FILE, --ckpt_path FILE,
    --key value. Images that exist already are kept.

    Args:
        prompts: Geneval++.jsonl, or a file of the same form.
        images: Folder of the images.
        seed: Seed of the noise; each image's noise depends on its prompt alone, not on the batch.
        batch_size: Number of images drawn at once.
        part: i/n draws only the i-th of n shares, for n processes at once.
        device: Name of the device; the default is the first GPU, or the CPU if there is none.
    """
    rows = enumerate(read_lines(prompts), start=1)
    drawings = [Drawing(Path(images, f"{line}.png"), row["prompt"], seeds_of(seed, line, 1)) for line, row in rows]
    return DrawingJob(Path(images), drawings, {"seed": seed}, batch_size, part, device)


def run(
    prompts: str,
    images: str,
    folder: str,
    max_cost_usd: float = 0.0,
    dry_run: bool = False,
    judge: str = JUDGE,
    prompt: str = PROMPT,
    cache: str | None = None,
    retry_errors: bool = False,
) -> None:
    """Ask the judge about every image that has no answer yet. May be stopped and started at any time.

    Args:
        prompts: Geneval++.jsonl: one line per image with tag, include, optionally exclude, and prompt.
        images: Folder of images named after the prompts' lines: 1.jpg (or .png, .jpeg, .webp) belongs to the first line.
        folder: Folder for the requests and the answers.
        max_cost_usd: Most that these requests may cost in USD, earlier runs included.
        dry_run: Only print the number of calls and their cost.
        judge: Judge file with one judge.
        prompt: Prompt file.
        cache: File of answers; the default is answers.jsonl in the folder. One file may serve several folders.
        retry_errors: Send a request again that another model answered than the one that was asked.
    """
    judge, prompt = configuration(judge, "--judge"), configuration(prompt, "--prompt")
    judges, asked, rows = read_judges(judge), read_prompt(prompt, {"0", "1"}), read_lines(prompts)
    if len(judges) != 1:
        raise ValueError(f"GenEval++ has one judge, --judge {judge!r} names {len(judges)}; give a file with one")
    files = image_files(images, len(rows))
    requests = _requests(next(iter(judges.values())), asked, rows, files)
    about = {"benchmark": BENCHMARK, "tags": [row["tag"] for row in rows], "images": Path(images).resolve().name}
    inputs = {"prompts": sha256(prompts), "judges": sha256(judge), "prompt": sha256(prompt)}
    write_plan(folder, JudgingPlan(judges, asked, requests, inputs, about))
    missing = [line for line in range(1, len(rows) + 1) if line not in files]
    if missing:
        print(f"MISSING, counted as wrong: {len(missing)} of {len(rows)} images, e.g. {', '.join(map(str, missing[:5]))}")
    ask(folder, max_cost_usd, dry_run, cache, retry_errors)


def _requests(judge: Judge, prompt: Prompt, rows: Sequence[Mapping[str, Any]], files: Mapping[int, Path]) -> tuple[JudgeRequest, ...]:
    given = {line: {"prompt": rows[line - 1]["prompt"], "checklist": checklist(rows[line - 1])} for line in sorted(files)}
    return tuple(
        judge_request(judge, prompt, texts, str(files[line]), image_digest(files[line]), {"line": line})
        for line, texts in given.items()
    )


def score(folder: str, output: str, system: str | None = None, cache: str | None = None) -> dict[str, Any]:
    """Compute the score from the answers so far. Needs no network.

    Args:
        folder: Folder that ``run`` wrote.
        output: Result file, ending in .json.
        system: Name of the system that drew the images; the default is the name of their folder.
        cache: File of answers; the default is answers.jsonl in the folder.
    """
    check_output(output)
    plan = read_plan(folder)
    answers, tags = open_cache(folder, cache), plan.about["tags"]
    said = {request.about["line"]: answers.answer(request, plan.prompt) for request in plan.requests}
    verdicts = [verdict(said, line) for line in range(1, len(tags) + 1)]
    done, cases = status(plan, answers), scored_cases(tags, verdicts)
    result = write_result(
        output,
        BENCHMARK,
        system or plan.about["images"],
        summarize(cases),
        {"judges": done["models"], "prompt": [plan.prompt.name, plan.prompt.version, plan.prompt.digest]},
        plan.inputs,
        cases,
        **done,
        missing=[line for line in range(1, len(tags) + 1) if line not in said],
        failed=[line for line, found in enumerate(verdicts, start=1) if found == FAILED],
        verdicts=verdicts,
    )
    lines = {key: list(map(str, result[key])) for key in ("missing", "failed")}
    print(score_table(result, {f"{key}, counted as wrong": numbers for key, numbers in lines.items()}))
    print(f"\n{done['status']}: {done['answered']} of {done['questions']} answers by {done['models']}")
    return result


def verdict(said: Mapping[int, str | None], line: int) -> int:
    """Verdict of an image: 1 for correct, 0 for wrong or missing, `FAILED` without a usable answer.

    Args:
        said: Line of each image that exists to the judge's answer, None if there is none.
        line: Line of the prompt, from 1.
    """
    if line not in said:
        return 0
    answer = said[line]
    return int(answer) if answer in ("0", "1") else FAILED


def scored_cases(tags: Sequence[str], verdicts: Sequence[int]) -> dict[str, list[Case]]:
    """Name of each score to its cases: the mean of the tags' accuracies, each tag, and all images alike; `FAILED` is wrong."""
    everything = [
        Case(str(line), float(verdict == 1), group=tag)
        for line, (tag, verdict) in enumerate(zip(tags, verdicts, strict=True), start=1)
    ]
    correct = [replace(case, group="") for case in everything]
    return {"overall": everything, **by_group(everything), "correct images": correct}


def checklist(row: Mapping[str, Any]) -> str:
    """The requirements on an image, one numbered line each, from the metadata of its prompt."""
    lines = [_requirement(item) for item in row["include"]]
    lines += [f"fewer than {item['count']} of: {item['class']}" for item in row.get("exclude", ())]
    return "\n".join(f"{i}. {line}" for i, line in enumerate(lines, start=1))


def _requirement(item: Mapping[str, Any]) -> str:
    count = int(item["count"])
    parts = [f"exactly {count} of: {item['class']}"]
    each = "it is" if count == 1 else "each of them is"
    if item.get("color"):
        parts.append(f"{each} {item['color']}")
    if item.get("region"):
        parts.append(f"{each} {REGIONS.get(item['region'], item['region'])} of the image")
    if item.get("size"):
        parts.append(f"{each} {SIZES.get(item['size'], item['size'])}")
    return "; ".join(parts)


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The prompts of a file, one per line.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is empty, or a line is not a prompt of GenEval++.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no prompts at {str(path)!r}; get {FETCH}")
    rows = []
    for number, line in enumerate(lines_of(text_of(Path(path).read_bytes()).rstrip()), start=1):
        try:
            rows.append(json.loads(line))
            fine = isinstance(rows[-1]["tag"], str) and bool(rows[-1]["prompt"].strip()) and bool(checklist(rows[-1]))
        except (ValueError, KeyError, TypeError, AttributeError):
            fine = False
        if not fine:
            raise ValueError(f"line {number} of {str(path)!r} needs tag, prompt and include (class, count, ...); correct --prompts")
    if not rows:
        raise ValueError(f"{str(path)!r} holds no prompt; correct --prompts")
    return rows


def image_files(folder: str | Path, lines: int) -> dict[int, Path]:
    """Line of a prompt (from 1) to the file of its image, for prompts that have one.

    Raises:
        FileNotFoundError: The folder does not exist or holds no image of these prompts.
        ValueError: A prompt has several images.
    """
    found: dict[int, Path] = {}
    named: dict[str, list[Path]] = {}
    for file in sorted(Path(folder).glob("*")):
        if file.suffix.lower() in SUFFIXES:
            named.setdefault(file.stem, []).append(file)
    for line in range(1, lines + 1):
        files = named.get(str(line), [])
        if len(files) > 1:
            raise ValueError(f"line {line} has several images in {str(folder)!r}: {files[0].name}, {files[1].name}; keep one")
        if files:
            found[line] = files[0]
    if not found:
        raise FileNotFoundError(f"no image of {lines} prompts in {str(folder)!r}: they are named 1.png, 2.png, ...; correct --images")
    return found


def main(args: Sequence[str]) -> None:
    """Run ``generate``, ``run`` or ``score``."""
    if args[:1] == ["generate"]:
        generate_command(BENCHMARK, generate, args[1:])
        return
    functions: dict[str, Function] = {"generate": generate, "run": run, "score": score}  # generate is here for --help
    run_command(BENCHMARK, functions, args)
