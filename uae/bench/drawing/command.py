"""``python -m uae.bench draw``: captions become a folder of pictures by an image model behind an API, and are scored.

docs/benchmarks.md has the whole sequence of commands.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from callbacks.predictions import CAPTIONS, check_apart, collect, file_name
from uae.bench.arguments import run as run_command
from uae.bench.drawing.drawing_run import DrawingRun
from uae.bench.drawing.image_model import OPENAI_KEY, ImageModel
from uae.bench.generate import Drawing, DrawingJob, drawn_prompts, set_gone_aside
from uae.bench.judging.captions import check_sources, find_images, read_captions, recorded_sources
from uae.bench.output_folder import ASIDE, SOURCE, check_beside, claim_folder, set_aside
from uae.bench.result import check_output
from uae.bench.score.command import score_folders
from uae.bench.score.encoder_sets import read_encoders
from uae.bench.vendors.records import Records
from uae.files.whole import write_whole

RECORDS = "draws.jsonl"
STATUS = "status.json"
NAMED = 20  # failed images that are printed


def draw(
    captions: str,
    model: str,
    output: str,
    usd_per_image: float,
    max_cost_usd: float = 0.0,
    size: str | None = None,
    params: dict[str, Any] | None = None,
    base_url: str | None = None,
    key_env: str | None = None,
    concurrency: int = 4,
    timeout: float = 300.0,
    retries: int = 6,
    retry_failed: bool = False,
    dry_run: bool = False,
    sources: str | None = None,
    encoders: str | None = None,
    result: str | None = None,
) -> dict[str, Any]:
    """Draw each caption once with an image model behind an API. May be stopped and started at any time.

    Args:
        captions: JSON or JSON Lines with a name and a caption per image, as ``predict`` and ``bench run`` write.
        model: Id of the image model, as gpt-image-1.
        output: Folder of the pictures (PNG, named after the images) and of captions.json, as ``score`` takes it.
        usd_per_image: Price of one image of this size and quality in USD, its prompt included; 0 for a server of your own.
        max_cost_usd: Most that this folder may cost in USD, earlier calls of the command included.
        size: Size of the images, as 1024x1024; the default is the model's own.
        params: Further parameters of the call, passed on unchanged, as --params.quality high.
        base_url: Address of the API, of another server that speaks it; the default is OpenAI's.
        key_env: Name of the environment variable that holds the key; the default is OPENAI_API_KEY, or no key with --base_url.
        concurrency: Number of calls at a time.
        timeout: Longest duration of one try, in seconds.
        retries: Number of further tries after a failed one.
        retry_failed: Ask again for captions that were refused, or that were paid without a picture.
        dry_run: Only print the number of calls and their cost; this needs no key and no network, and writes nothing.
        sources: Folder of the source images; the pictures are scored beside them.
        encoders: Encoders of the score, see ``score``; only with --sources.
        result: Result file of the score, ending in .json; the default is the output folder's name with .json, beside it.
    """
    folder = Path(output)
    key = key_env if key_env is not None else OPENAI_KEY if base_url is None else None
    drawer = ImageModel(
        name=model, api="openai", model=model, key_env=key, base_url=base_url, concurrency=concurrency, timeout=timeout,
        retries=retries, usd_per_image=usd_per_image, size=size, params=params or {},
    )  # fmt: skip
    texts = read_captions(captions)
    if Path(captions).resolve() == (folder / CAPTIONS).resolve():
        raise ValueError(f"--captions {captions!r} would be written over, with the captions that are drawn; give another --output")
    files = {name: file_name(name) for name in texts}
    check_apart((file, name) for name, file in files.items())
    target = result or str(folder.resolve().with_name(f"{folder.resolve().name}.json"))
    _check_scoring(sources, encoders, result, target, folder, captions, list(texts))
    job = DrawingJob(folder, [Drawing(folder / file, texts[name], ()) for name, file in files.items()], drawer.identity)
    claim = partial(claim_folder, folder, job.origin, [drawing.path for drawing in job.drawings])
    claim(write=False)
    records = Records(folder / RECORDS)
    with nullcontext() if dry_run else records.writing():
        drawn, gone = drawn_prompts(job)
        run = DrawingRun(drawer, job.drawings, drawn, records, claim, max_cost_usd, retry_failed)
        print(run.estimate())
        if dry_run:
            return {"status": "dry run", "calls": 0}
        _draw(run, job, gone, {name: (files[name], text) for name, text in texts.items()}, recorded_sources(captions))
    found = _report(run, job, {str(folder / file): name for name, file in files.items()})
    if sources is not None:
        _check_complete(found)
        score_folders(sources, output, target, encoders)
    return found


def _check_scoring(
    sources: str | None, encoders: str | None, result: str | None, target: str, folder: Path, captions: str, names: list[str]
) -> None:
    """Raise before anything is paid for if the pictures could not be scored."""
    if sources is None:
        if encoders is not None or result is not None:
            raise ValueError("--encoders and --result are about the score, for which --sources is missing; give it")
        return
    check_beside(sources, folder)
    check_output(target, "--result")
    read_encoders(encoders)
    found = find_images(sources, names, "--sources")
    if not found:
        raise ValueError(f"--sources {sources!r} holds none of the {len(names)} images that --captions names; correct --sources")
    check_sources(captions, found, "--sources")


def _draw(
    run: DrawingRun, job: DrawingJob, gone: Sequence[Path], rows: Mapping[str, tuple[str, str]], digests: Mapping[str, str]
) -> None:
    """Bring the folder up to date, draw what is missing, and write ``captions.json`` of what is there, also after an error."""
    client = run.prepared()
    set_gone_aside(job.folder, gone)
    changed = [each.path for each in job.drawings if each.path in run.drawn and run.drawn[each.path] != each.prompt]
    if changed:
        print(f"{len(changed)} captions have changed: what was drawn before goes to {ASIDE} (first: {changed[0].name})")
        set_aside(job.folder, changed)
        for path in changed:
            del run.drawn[path]
    try:
        run.run(client)
    finally:
        there = {name: row for name, row in rows.items() if run.drawn.get(job.folder / row[0]) == row[1]}
        collect(
            job.folder,
            [
                {"name": name, "caption": text, "reconstruction": file} | ({SOURCE: digests[name]} if name in digests else {})
                for name, (file, text) in there.items()
            ],
        )


def _report(run: DrawingRun, job: DrawingJob, names: Mapping[str, str]) -> dict[str, Any]:
    """Print, return and write (``status.json``) what has become of the captions.

    Raises:
        ValueError: The model is given up.
    """
    left, tries = len(run.left()), run.attempts
    failed = {names[str(each.path)]: run.failed[each.prompt] for each in job.drawings if each.prompt in run.failed}
    found: dict[str, Any] = {
        "status": "partial" if left else "complete",
        "captions": len(job.drawings),
        "drawn": len(job.drawings) - left - len(failed),
        "failed": failed,
        "left": left,
        "calls": tries.calls,
        "cost_usd": run.spent,
    }
    write_whole(job.folder / STATUS, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    for failure, times in Counter(tries.failures).most_common(5):
        print(f"{times} times: {failure}")
    for name, why in list(failed.items())[:NAMED]:
        print(f"* FAILED: {name} ({why})")
    if len(failed) > NAMED:
        print(f"* FAILED: {len(failed) - NAMED} more, see {job.folder / STATUS}")
    print(
        f"{found['status']}: {found['drawn']} of {found['captions']} images in {job.folder}, {len(failed)} failed, {left} left to "
        f"draw; {tries.calls} calls now, {run.spent:.4f} USD in all"
    )
    for name, why in tries.closed.items():
        raise ValueError(f"model {name} is given up ({why}); {left} images are left to draw: correct the cause and run again")
    return found


def _check_complete(found: Mapping[str, Any]) -> None:
    """Refuse to score a folder that the next call would complete, or that holds nothing."""
    if found["left"]:
        raise ValueError(f"{found['left']} images are left to draw, so the folder is not scored: raise --max_cost_usd, or run again")
    if not found["drawn"]:
        raise ValueError("no image could be drawn, so there is nothing to score; see the failures above")


def main(args: Sequence[str]) -> None:
    """Run the command with the words behind its name."""
    run_command("draw", draw, args)
