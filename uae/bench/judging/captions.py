"""Reading the captions of several systems for the same images, and making the requests that compare them."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

from uae.bench.fingerprints import sha256
from uae.bench.judging.judges import Judge
from uae.bench.judging.prompt import Prompt
from uae.bench.judging.requests import JudgeRequest, image_digest, judge_request
from uae.bench.output_folder import SOURCE
from uae.files.lines import lines_of, text_of

_FENCE = re.compile(r"^```.*$", re.MULTILINE)
_LINE_MARKS = re.compile(r"^\s*(?:#{1,6}\s+|>\s?|[-*+]\s+)", re.MULTILINE)
_MARKS = re.compile(r"(\*\*|__|`)(.+?)\1", re.DOTALL)
_PREAMBLE = re.compile(
    r"^(?:(?:sure|certainly|of course|okay)[!,.]\s*)?"
    r"(?:here(?:'s| is)\b[^:.\n]{0,80}\b(?:caption|description)\b[^:.\n]{0,40}:|caption:)\s*",
    re.IGNORECASE,
)


def read_captions(path: str | Path) -> dict[str, str]:
    """The captions of a file: name of an image to its caption.

    Args:
        path: JSON (a list of objects with ``name`` and ``caption``, as ``predict`` writes, or a mapping of name to caption),
            or JSON Lines of such objects.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file holds something else, or several captions for one image.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no captions at {str(path)!r}; correct --captions")
    try:
        rows = _rows(text_of(Path(path).read_bytes()))
        pairs = [(row["name"], row["caption"]) for row in rows]
    except (ValueError, KeyError, TypeError):
        pairs = [(None, None)]
    if not pairs or not all(isinstance(word, str) for pair in pairs for word in pair):
        raise ValueError(f"{str(path)!r} must hold JSON or JSON Lines with a name and a caption per image")
    captions = dict(pairs)
    if len(captions) < len(pairs):
        raise ValueError(f"{len(pairs) - len(captions)} images of {str(path)!r} have several captions; keep one each")
    return captions


def check_sources(path: str | Path, images: Mapping[str, Path], option: str = "--images") -> None:
    """Refuse captions of other pictures than those that judges would see. Only ``bench run`` records what its captions are of.

    Args:
        path: A file that `read_captions` reads.
        images: Name of an image to its file.
        option: The option that names their folder, for the error.

    Raises:
        ValueError: An image is another file by now than the one that was captioned.
    """
    recorded = recorded_sources(path)
    changed = [name for name, file in images.items() if name in recorded and recorded[name] != sha256(file)]
    if changed:
        raise ValueError(
            f"{str(path)!r} has captions of other pictures than {option} holds now ({len(changed)}, e.g. {changed[0]}); caption them "
            f"again (bench run continues its folder), or give the folder that was captioned by {option}"
        )


def recorded_sources(path: str | Path) -> dict[str, str]:
    """Name of an image to the sha256 of the file that was captioned, where a file that `read_captions` reads has recorded it."""
    return {row["name"]: row[SOURCE] for row in _rows(text_of(Path(path).read_bytes())) if SOURCE in row}


def _rows(text: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(text)
    except ValueError:
        return [json.loads(line) for line in lines_of(text) if line.strip()]
    if isinstance(content, dict) and not {"name", "caption"} <= content.keys():
        return [{"name": name, "caption": caption} for name, caption in content.items()]
    return content if isinstance(content, list) else [content]


def plain(caption: str) -> str:
    """A caption without Markdown and without an opening such as "Here is a caption:"; the caption's own words are kept."""
    text = _LINE_MARKS.sub("", _FENCE.sub("", unicodedata.normalize("NFC", caption)))
    while (bare := _MARKS.sub(r"\2", text)) != text:
        text = bare
    return " ".join(_PREAMBLE.sub("", text.strip()).split())


def find_images(folder: str | Path, names: list[str], option: str = "--images") -> dict[str, Path]:
    """Find the image file of each name: a path below the folder, with or without its extension. Names without a file are left out."""
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of images at {str(folder)!r}; correct {option}")
    stems: dict[str, list[Path]] = {}
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        stems.setdefault(path.relative_to(root).with_suffix("").as_posix(), []).append(path)
    found = {name: root / name for name in names if (root / name).is_file()}
    return found | {name: stems[name][0] for name in names if name not in found and len(stems.get(name, ())) == 1}


def compared(systems: list[str], ours: str, all_pairs: bool) -> list[tuple[str, str]]:
    """Pairs of systems to compare: ``ours`` with each other system, or every system with every other."""
    ordered = [ours, *(system for system in systems if system != ours)]
    return list(combinations(ordered, 2)) if all_pairs else [(ours, rival) for rival in ordered[1:]]


def caption_requests(
    judges: Mapping[str, Judge],
    prompt: Prompt,
    captions: Mapping[str, Mapping[str, str]],
    images: Mapping[str, Path],
    pairs: list[tuple[str, str]],
) -> Iterator[JudgeRequest]:
    """Requests to compare each pair of captions, in both orders, by each judge.

    Requests are ordered by image, so that an interrupted run has all answers about the images it got to. Equal captions are not
    compared.

    Args:
        judges: Judges by name.
        prompt: Instruction with the placeholders ``$first`` and ``$second``.
        captions: System to name of an image to plain caption.
        images: Name of an image to its file.
        pairs: Pairs of systems.
    """
    for name, path in sorted(images.items()):
        sha256 = image_digest(path) if prompt.image else ""
        for a, b in pairs:
            text_a, text_b = captions[a].get(name), captions[b].get(name)
            if text_a is None or text_b is None or text_a == text_b:
                continue
            for judge in judges.values():
                for order, first, second in (("ab", text_a, text_b), ("ba", text_b, text_a)):
                    about = {"image": name, "a": a, "b": b, "order": order}
                    yield judge_request(judge, prompt, {"first": first, "second": second}, str(path), sha256, about)
