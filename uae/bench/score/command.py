"""Unified-Bench protocol 1 (arXiv 2509.09666): similarity of source images and a system's reconstructions.

python -m uae.bench score --sources DIR --reconstructions DIR --output result.json
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from uae.bench.arguments import run
from uae.bench.result import Score, check_output, read_result, write_result
from uae.bench.score.comparison import check_comparable, paired_difference, scored_cases
from uae.bench.score.contact_sheet import write_contact_sheet
from uae.bench.score.encoder_sets import (
    EncoderSet,
    encoder_configuration,
    encoder_record,
    paper_encoders,
    read_encoders,
)
from uae.bench.score.feature_cache import FeatureCache, default_folder
from uae.bench.score.features import ImageFeatures
from uae.bench.score.page import write_score_page
from uae.bench.score.pairs import Pairs, pair, recorded
from uae.bench.score.similarities import Similarities, measure, summarize
from uae.bench.system import working_device
from uae.data.folder import list_images
from uae.report.bench_page import Table

NAME = "unified_bench_1"
IMAGE_READING = "upright (EXIF), on white where transparent, 16 bit scaled to 8, first frame, RGB"


def score_folders(
    sources: str,
    reconstructions: str,
    output: str,
    encoders: str | None = None,
    system: str | None = None,
    compare: str | None = None,
    cache: bool = True,
    cache_folder: str | None = None,
    batch_size: int = 32,
    workers: int = 4,
    device: str | None = None,
    resamples: int = 1000,
    max_pixels: int = 178_956_970,
) -> dict[str, Any]:
    """Similarity of source images and reconstructions under CLIP, LongCLIP, DINOv2 and DINOv3.

    Args:
        sources: Folder of the source images.
        reconstructions: Folder of the reconstructions, paired with sources by name: equal, with .png appended, with another suffix,
            or with the prefix recon_.
        output: Result file, ending in .json; a table (.md), a contact sheet (.png) and a page (.html) are written beside it.
        encoders: YAML file of encoder name to class_path and init_args (configs/bench); the default is the paper's four encoders.
        system: Name of the system that made the reconstructions; the default is the name of their folder.
        compare: Another result file; the paired difference to it is printed and stored.
        cache: Whether to keep embeddings on disk, so that no image is embedded twice, also after an interruption.
        cache_folder: Folder of the embeddings; the default is uae/features in the user's cache folder.
        batch_size: Number of images per forward pass.
        workers: Number of threads that read and prepare images.
        device: Name of the device; the default is the first GPU, or the CPU if there is none.
        resamples: Number of bootstrap resamples for the 95 % intervals.
        max_pixels: Images with more pixels count as unreadable.
    """
    if min(batch_size, workers, resamples, max_pixels) < 1:
        raise ValueError("batch_size, workers, resamples and max_pixels must be 1 or more")
    check_output(output)
    other = read_result(compare) if compare else None
    chosen, pairs = read_encoders(encoders), pair(sources, reconstructions)
    roots = Path(sources).expanduser(), Path(reconstructions).expanduser()
    _check_sheet(Path(output).with_suffix(".png"), [root / name for root in roots for name in list_images(root, "images")])
    features, backend = _load(chosen, device, FeatureCache((cache_folder or default_folder()) if cache else None),
                              batch_size=batch_size, workers=workers, max_pixels=max_pixels)  # fmt: skip
    kind, name = benchmark(chosen), system or roots[1].resolve().name
    if other is not None:
        check_comparable({"benchmark": kind, "system": name, "backend": backend}, other)
    found = measure(features, pairs.matched, *roots)
    if not found.names:
        raise ValueError(_nothing(sources, reconstructions, pairs, found))
    content = _content(found, pairs, chosen, resamples) | {"backend": backend}
    if other is not None:
        rows = paired_difference(content["cases"], other, resamples)
        content["comparison"] = {"other": other["system"], "difference": rows}
    result = write_result(output, system=name, **content)
    table = markdown(result)
    target = Path(output)
    target.with_suffix(".md").write_text(table)
    files = [(roots[0] / n, roots[1] / pairs.matched[n]) for n in found.names]
    write_contact_sheet(target.with_suffix(".png"), files, found.names, found.cosine_NE.mean(1), max_pixels)
    captions = {name: row["caption"] for name, row in recorded(roots[1]).items() if isinstance(row.get("caption"), str)}
    write_score_page(target.with_suffix(".html"), result, tables_of(result), files, captions, max_pixels)
    print(f"{table}\nresult, table, contact sheet and page: {target.with_suffix('')}.{{json,md,png,html}}")
    return result


def _check_sheet(sheet: Path, images: Sequence[Path]) -> None:
    """Raise if the contact sheet would be written over an image, or be taken for one by the next call."""
    if sheet.resolve() in {image.resolve() for image in images}:
        raise ValueError(f"--output: its contact sheet {str(sheet)!r} is one of the images; give a file in another folder")


def _load(chosen: EncoderSet, device: str | None, cache: FeatureCache, **sizes: int) -> tuple[ImageFeatures, dict[str, Any]]:
    """Load the encoders; returns what embeds images with them, and their description for the result."""
    place = str(working_device(device))
    for encoder in chosen.encoders.values():
        encoder.load(place)
    records = {name: encoder_record(encoder) for name, encoder in chosen.encoders.items()}
    marks = {name: record["fingerprint"] for name, record in records.items()}
    backend = {"encoders": records, "held_out": list(chosen.held_out), "reading": IMAGE_READING, "device": place}
    return ImageFeatures(chosen.encoders, marks, cache, place, **sizes), backend


def _content(found: Similarities, pairs: Pairs, chosen: EncoderSet, resamples: int) -> dict[str, Any]:
    """Everything that the result file holds but the name of the system and the backend."""
    rows = zip(found.names, found.digests, found.cosine_NE.tolist(), found.floor_NE.tolist(), strict=True)
    per_image = [
        {
            "name": name,
            "reconstruction": pairs.matched[name],
            "source_sha256": digests[0],
            "overall": float(np.mean(cosine_E)),
            "cosine": dict(zip(found.encoders, cosine_E, strict=True)),
            "floor": None if np.isnan(floor_E).any() else dict(zip(found.encoders, floor_E, strict=True)),
        }
        for name, digests, cosine_E, floor_E in rows
    ]
    inputs = {}
    for side, title in enumerate(("sources", "reconstructions")):
        lines = "".join(f"{digests[side]} {name}\n" for name, digests in zip(found.names, found.digests, strict=True))
        inputs[title] = hashlib.sha256(lines.encode()).hexdigest()
    return {
        "benchmark": benchmark(chosen),
        "scores": summarize(found, chosen.held_out, resamples),
        "inputs": inputs,
        "cases": scored_cases(found, chosen.held_out),
        **official_layout(found, pairs),
        "per_image": per_image,
        "left_out": {
            "unmatched_sources": pairs.unmatched_sources,
            "unmatched_reconstructions": pairs.unmatched_reconstructions,
            "ambiguous": pairs.ambiguous,
            **({"changed": pairs.changed} if pairs.changed else {}),
            "unreadable": found.unreadable,
        },
        "invalid": found.invalid,
    }


def benchmark(chosen: EncoderSet) -> str:
    """Name of the benchmark; a set of encoders that is not the paper's becomes part of it."""
    given, paper = ({name: encoder_configuration(one) for name, one in each.encoders.items()} for each in (chosen, paper_encoders()))
    return NAME if given == paper else f"{NAME} ({', '.join(chosen.encoders)})"


def official_layout(found: Similarities, pairs: Pairs) -> dict[str, Any]:
    """The keys of the official results, for scripts that read those; null where there is no score."""
    names = list(found.encoders)
    left_out = {file.removeprefix("sources/") for file in pairs.ambiguous if file.startswith("sources/")}
    everything = sorted({*pairs.matched, *pairs.unmatched_sources, *pairs.changed, *left_out})
    similarities: dict[str, dict[str, float | None]] = {}
    statistics = {}
    for column, name in enumerate(names):
        cosine_N = found.cosine_NE[:, column].tolist()
        known = dict(zip(found.names, cosine_N, strict=True))
        similarities[name] = {image: known.get(image) for image in everything}
        statistics[name] = {
            "total_images": len(everything),
            "valid_pairs": len(cosine_N),
            "average_similarity": float(np.mean(cosine_N)),
            "min_similarity": min(cosine_N),
            "max_similarity": max(cosine_N),
        }
    averages = {name: statistics[name]["average_similarity"] for name in names}
    ranked = sorted(averages.items(), key=lambda item: item[1])
    summary = {
        "models_used": names,
        "average_scores_by_model": averages,
        "overall_average": float(np.mean(list(averages.values()))),
        "best_model": ranked[-1],
        "worst_model": ranked[0],
    }
    return {
        "model_types": names, "similarities_by_model": similarities, "statistics_by_model": statistics, "summary": summary,
    }  # fmt: skip


def markdown(result: dict[str, Any]) -> str:
    """The result as Markdown tables, cosines multiplied by 100, with every file that was left out."""
    n = result["scores"]["overall"]["n"]
    lines = [f"# {result['benchmark']}: {result['system']}", "", f"{n} pairs; cosines times 100"]
    for table in tables_of(result):
        lines += ["", *([f"{table.title}:", ""] if table.title else [])]
        lines += [f"| {' | '.join(cells)} |" for cells in (table.head, ["---"] * len(table.head), *table.rows)]
        lines += ["", *(f"* {note}" for note in table.notes)] if table.notes else []
    return "\n".join([*lines, ""])


def tables_of(result: dict[str, Any]) -> list[Table]:
    """The scores, the difference to another result if there is one, and then the files that were left out, as notes."""
    scores, statistics = result["scores"], result["statistics_by_model"]
    rows = []
    for name in ("overall", "held_out", *result["model_types"]):
        if name in scores:
            ends = statistics.get(name, {})
            extremes = [f"{100 * ends[key]:.2f}" if ends else "" for key in ("min_similarity", "max_similarity")]
            cells = [_times_100(scores[name]), _ends(scores[name]), *extremes]
            cells += [_times_100(scores.get(f"{kind}/{name}")) for kind in ("floor", "calibrated")]
            rows.append([name.replace("_", " "), *cells])
    tables = [Table("", ["", "mean", "95 % interval", "min", "max", "floor", "calibrated"], rows)]
    if comparison := result.get("comparison"):
        gaps = [
            [name.replace("_", " "), f"{100 * gap['value']:+.2f}", _ends(gap, "+"), str(gap["n"])]
            for name, gap in comparison["difference"].items()
        ]
        tables.append(Table(f"Difference to {comparison['other']}, paired", ["", "difference", "95 % interval", "n"], gaps))
    if left_out := _left_out(result):
        tables[-1] = replace(tables[-1], notes=["not in the means, except where it says so:", *left_out])
    return tables


def _times_100(entry: Score | None) -> str:
    return f"{100 * entry['value']:.2f}" if entry else ""


def _ends(entry: Score, sign: str = "") -> str:
    return f"{100 * entry['low']:{sign}.2f} to {100 * entry['high']:{sign}.2f}"


def _left_out(result: dict[str, Any]) -> list[str]:
    left_out = result["left_out"]
    lines = [f"source without reconstruction: {name}" for name in left_out["unmatched_sources"]]
    lines += [f"reconstruction without source: {name}" for name in left_out["unmatched_reconstructions"]]
    lines += [f"ambiguous: {name} (could be {', '.join(others)})" for name, others in left_out["ambiguous"].items()]
    lines += [f"made of another file than the source is now, continue bench run: {name}" for name in left_out.get("changed", ())]
    lines += [f"unreadable: {name} ({reason})" for name, reason in left_out["unreadable"].items()]
    lines += [f"counted as 0, an embedding has no direction: {name}" for name in result["invalid"]]
    return lines


def _nothing(sources: str, reconstructions: str, pairs: Pairs, found: Similarities) -> str:
    reasons = [f"{name}: {reason}" for name, reason in found.unreadable.items()]
    return (
        f"no pair of {sources!r} and {reconstructions!r} can be scored: {len(pairs.unmatched_sources)} sources and "
        f"{len(pairs.unmatched_reconstructions)} reconstructions without a partner, {len(pairs.ambiguous)} ambiguous, "
        f"{len(pairs.changed)} of another source, {len(reasons)} unreadable {reasons[:1]}; name reconstructions like their sources"
    )


def main(args: Sequence[str]) -> None:
    """Run the command with the words behind its name."""
    run("score", score_folders, args)
