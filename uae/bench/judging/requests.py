"""The plan of a comparison: its judges, its prompt and its requests, as files that are written once, before judges are asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from uae.bench.judging.judges import Judge, judge_of
from uae.bench.judging.prompt import Prompt, prompt_of
from uae.files.lines import read_lines
from uae.files.whole import write_whole

MEDIA = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif"}


@dataclass(frozen=True)
class JudgeRequest:
    """One question to one judge.

    Args:
        key: Digest of everything that the answer depends on; requests with equal keys are sent once.
        judge: Name of the judge.
        given: Name of each placeholder of the prompt to its text.
        image: Path of the image; None if the judge sees no image.
        image_sha256: The sha256 of the image file; empty without an image.
        about: Which case of the benchmark the answer belongs to; not part of the key.
    """

    key: str
    judge: str
    given: Mapping[str, str]
    image: str | None
    image_sha256: str
    about: Mapping[str, Any]


@dataclass(frozen=True)
class JudgingPlan:
    """Everything that is needed to ask the judges and to score their answers.

    Args:
        judges: Judges by name.
        prompt: Prompt for all judges.
        requests: Requests in the order in which they are sent.
        inputs: Name to sha256 of each input file.
        about: What the benchmark needs to score the answers, such as its list of cases.
    """

    judges: Mapping[str, Judge]
    prompt: Prompt
    requests: tuple[JudgeRequest, ...]
    inputs: Mapping[str, str]
    about: Mapping[str, Any]


def judge_request(
    judge: Judge, prompt: Prompt, given: Mapping[str, str], image: str | None, image_sha256: str, about: Mapping[str, Any]
) -> JudgeRequest:
    """Make a request; for the arguments see `JudgeRequest`. The image is left out if the prompt does not show it."""
    image, image_sha256 = (image, image_sha256) if prompt.image else (None, "")
    content = [judge.api, judge.model, dict(judge.params), prompt.digest, image_sha256, dict(given)]
    key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return JudgeRequest(key, judge.name, given, image, image_sha256, about)


def media_type(content: bytes) -> str | None:
    """Media type of an image file that judges accept (JPEG, PNG, GIF or WebP); None for any other file."""
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp"
    return next((media for magic, media in MEDIA.items() if content.startswith(magic)), None)


def image_digest(path: str | Path) -> str:
    """The sha256 of an image file.

    Raises:
        ValueError: The file has a format that judges do not accept.
    """
    content = Path(path).read_bytes()
    if media_type(content) is None:
        raise ValueError(f"judges read JPEG, PNG, GIF and WebP, {str(path)!r} is none of them; convert it")
    return hashlib.sha256(content).hexdigest()


def write_plan(folder: str | Path, plan: JudgingPlan) -> None:
    """Write ``plan.json`` and ``requests.jsonl`` into a folder, each whole or not at all."""
    judges = {name: {k: v for k, v in asdict(judge).items() if k not in ("name", "vendor")} for name, judge in plan.judges.items()}
    content = {"judges": judges, "prompt": asdict(plan.prompt), "inputs": dict(plan.inputs), "about": dict(plan.about)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(asdict(request)) + "\n" for request in plan.requests)
    write_whole(Path(folder, "requests.jsonl"), lines.encode())
    write_whole(Path(folder, "plan.json"), (json.dumps(content, indent=2) + "\n").encode())


def read_plan(folder: str | Path) -> JudgingPlan:
    """Read what `write_plan` wrote into a folder.

    Raises:
        FileNotFoundError: A file does not exist.
        ValueError: A file was changed and cannot be read.
    """
    try:
        content = json.loads(Path(folder, "plan.json").read_text())
        lines = read_lines(Path(folder, "requests.jsonl"))
        requests = tuple(JudgeRequest(**json.loads(line)) for line in lines)
    except FileNotFoundError:
        raise FileNotFoundError(f"nothing is built in {str(folder)!r} (plan.json, requests.jsonl); build first") from None
    except (ValueError, TypeError):
        raise ValueError(f"plan.json or requests.jsonl in {str(folder)!r} cannot be read; build again, answers are kept") from None
    judges = {name: judge_of(name, entry) for name, entry in content["judges"].items()}
    return JudgingPlan(judges, prompt_of(content["prompt"], "plan.json"), requests, content["inputs"], content["about"])
