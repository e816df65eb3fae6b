"""Which text-to-image pipelines of diffusers work: tiny random checkpoints of each, loaded as a configuration loads them.

    python -m benchmarks.breadth.pipelines                  # all, a few minutes on one CPU core
    python -m benchmarks.breadth.pipelines ZImage Flux2     # some, printed only

For each pipeline, at guidance 1 and 3: are the pixels of a row those of the row alone, and those of the pipeline's own call; are they
the same again; do they follow the caption and the guidance; does a gradient reach the embeddings; is the policy's ratio 1 at the
weights that drew; which layers does an adapter find; does the memory plan count the networks that are loaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

from benchmarks.breadth.checkpoints.catalog import CATALOG
from benchmarks.breadth.checks import PIXELS, RATIO, measured

RESULTS = Path(__file__).parents[1] / "results"
LEAST = 1e-4  # by which a caption and guidance change pixels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"pipelines; all if none is given: {', '.join(CATALOG)}")
    names = parser.parse_args().names
    _quiet()
    report = {}
    with tempfile.TemporaryDirectory() as place:
        captioner = _captioner(Path(place))
        for name in names or CATALOG:
            report[name] = _one(name, Path(place), captioner)
            print(name, "|", verdict(report[name]), "|", reasons(report[name]), flush=True)
            if names:
                print(json.dumps(report[name], indent=1))
    if not names:
        (RESULTS / "breadth_pipelines.json").write_text(json.dumps(report, indent=1) + "\n")
        (RESULTS / "breadth_pipelines.md").write_text(table(report))


def _quiet() -> None:
    """Without the bars and warnings of the libraries."""
    import diffusers
    import transformers

    warnings.simplefilter("ignore")
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
        library.utils.logging.set_verbosity_error()


def _captioner(place: Path) -> Path:
    from uae.rehearsal.language_models import LANGUAGE_MODELS

    LANGUAGE_MODELS["Qwen/Qwen2.5-VL-3B-Instruct"](place / "captioner")
    return place / "captioner"


def _one(name: str, place: Path, captioner: Path) -> dict[str, Any]:
    folder = place / name.replace(", ", "-")
    try:
        CATALOG[name].write(folder)
    except ImportError as error:
        return {"not built": str(error)}
    return measured(folder, captioner, CATALOG[name])


def verdict(found: dict[str, Any]) -> str:
    """One of: works, works as text, renders, refused, crash, silently wrong, not built."""
    if "not built" in found:
        return "not built"
    parts = [value for value in found.values() if isinstance(value, dict)]
    if any("crash" in part for part in parts):
        return "crash"
    if wrong(found):
        return "silently wrong"
    if "refused" in found["guidance 1"]:
        return "refused"
    if "refused" in found["policy, guidance 1"]:
        return "renders"
    return "works as text" if found["guidance 1"]["text"] else "works"


def wrong(found: dict[str, Any]) -> list[str]:
    """What is not as it should be."""
    faults = []
    for key, part in found.items():
        if isinstance(part, dict):
            limits = {"alone": PIXELS, "own call": PIXELS, "again": 0.0, "ratio": RATIO, "pixels without noise": 2 * PIXELS}
            faults += [f"{key}: {name} {part[name]:.1e}" for name, limit in limits.items() if not part.get(name, 0.0) <= limit]
            if not part.get("global generator untouched", True):
                faults.append(f"{key}: global generator changed")
            if not part.get("caption moves pixels by", 1.0) > LEAST:
                faults.append(f"{key}: the caption changes nothing")
            if not 0 < part.get("gradient", 1.0) < float("inf"):
                faults.append(f"{key}: gradient {part['gradient']}")
            if not part.get("adapted layers with a gradient", 1) > 0:
                faults.append(f"{key}: an adapter gets no gradient")
    if not found.get("guidance moves pixels by", 1.0) > LEAST:
        faults.append("guidance changes nothing")
    return faults


def reasons(found: dict[str, Any]) -> str:
    """Why something is refused, crashes or is wrong, once each."""
    if "not built" in found:
        return found["not built"]
    parts = {key: part for key, part in found.items() if isinstance(part, dict)}
    said = {part[kind]: key for key, part in parts.items() for kind in ("refused", "crash") if kind in part}
    return "; ".join([*wrong(found), *(f"{key}: {why}" for why, key in said.items())])


def table(report: dict[str, Any]) -> str:
    """The matrix in Markdown."""
    import diffusers
    import torch
    import transformers

    libraries = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}"
    count: dict[str, int] = {}
    for found in report.values():
        count[verdict(found)] = count.get(verdict(found), 0) + 1
    lines = [
        "# Text-to-image pipelines of diffusers", "",
        f"`python -m benchmarks.breadth.pipelines`, {libraries}, float32, tiny random checkpoints in the official layouts.",
        f"Now: {', '.join(f'{number} {name}' for name, number in sorted(count.items(), key=lambda pair: -pair[1]))}.", "",
        "| pipeline | before | now | alone | own call | ratio - 1 | gradient | adapted layers | what is refused |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in report.items():
        worst = [_worst(found, key) for key in ("alone", "own call", "ratio", "gradient", "adapted layers")]
        lines.append(" | ".join([f"| {name}", CATALOG[name].before, verdict(found), *worst, _refused(found) + " |"]))
    return "\n".join(lines) + "\n"


def _worst(found: dict[str, Any], key: str) -> str:
    values = [part[key] for part in found.values() if isinstance(part, dict) and key in part]
    if not values:
        return ""
    return str(values[0]) if isinstance(values[0], int) else f"{max(values):.1e}"


def _refused(found: dict[str, Any]) -> str:
    said = {part["refused"]: key for key, part in found.items() if isinstance(part, dict) and "refused" in part}
    return found.get("not built", "") or "<br>".join(f"{key}: {why.partition(': ')[2]}" for why, key in said.items())


if __name__ == "__main__":
    main()
