"""How fast protocol 1 is scored, beside the official loop of one image at a time, and whether memory grows.

OMP_WAIT_POLICY=PASSIVE python benchmarks/speed/scoring.py

Passive, because threads of torch that wait by spinning make the official loop ten times slower on a busy machine.

Both read the same files through the same tiny random encoders in the released layouts, in turns, each round on images that
neither has seen (nothing comes from the cache). The official loop is that of its four scripts: one encoder after the other,
and for each pair both files are opened, prepared by transformers' own processor and embedded alone.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image

from uae.bench.score.command import score_folders
from uae.rehearsal.encoders import ENCODERS

RESULTS = Path("benchmarks/results")
OFFICIAL = {
    "clip": "openai/clip-vit-large-patch14",
    "longclip": "zer0int/LongCLIP-L-Diffusers",
    "dinov2": "facebook/dinov2-large",
    "dinov3": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}
MIB = 2**20


def picture(seed: int, size: int) -> Image.Image:
    """A photograph's stand-in: smooth colour, edges and grain."""
    draw = np.random.default_rng(seed)
    colors = Image.fromarray(draw.integers(0, 255, (9, 12, 3), dtype=np.uint8))
    coarse = colors.resize((size, size * 3 // 4), Image.Resampling.BICUBIC)
    grain = draw.integers(-12, 12, (size * 3 // 4, size, 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))


def write_pairs(root: Path, pairs: int, size: int, seed: int = 0) -> tuple[Path, Path]:
    """Sources as JPEG, reconstructions as PNG."""
    sources, reconstructions = root / "sources", root / "reconstructions"
    for folder in (sources, reconstructions):
        folder.mkdir(parents=True)
    for n in range(pairs):
        picture(seed + 2 * n, size).save(sources / f"{n:05d}.jpg", quality=92)
        picture(seed + 2 * n + 1, size).save(reconstructions / f"{n:05d}.png", compress_level=1)
    return sources, reconstructions


@torch.no_grad()
def official_loop(models: dict[str, tuple[Any, Any]], sources: Path, reconstructions: Path) -> dict[str, float]:
    """Encoder to mean similarity."""
    means = {}
    for name, (processor, model) in models.items():
        similarities = []
        for source in sorted(sources.iterdir()):
            features = []
            for file in (source, reconstructions / f"{source.stem}.png"):
                pixels = processor(images=Image.open(file).convert("RGB"), return_tensors="pt")
                if "clip" in name:
                    feature_1D = model.get_image_features(**pixels).pooler_output
                else:
                    feature_1D = model(**pixels).last_hidden_state[:, 0]
                features.append(feature_1D / feature_1D.norm(dim=-1, keepdim=True))
            similarities.append(float((features[0] * features[1]).sum()))
        means[name] = statistics.mean(similarities)
    return means


def ours(sources: Path, reconstructions: Path, output: Path, **options: Any) -> dict[str, float]:
    """Encoder to mean similarity."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = score_folders(str(sources), str(reconstructions), str(output), **options)
    return result["summary"]["average_scores_by_model"]


def race(root: Path, pairs: int, rounds: int, size: int, threads: int) -> dict[str, Any]:
    """Seconds of both in turns, on the same files; results must agree. Torch computes with so many threads."""
    from transformers import AutoImageProcessor, AutoModel

    checkpoints = Path(os.environ["UAE_CHECKPOINTS"])
    models = {
        name: (AutoImageProcessor.from_pretrained(checkpoints / path), AutoModel.from_pretrained(checkpoints / path).eval())
        for name, path in OFFICIAL.items()
    }
    torch.set_num_threads(threads)
    warm = write_pairs(root / "warm", 4, size, seed=10**6)
    official_loop(models, *warm)
    ours(*warm, root / "warm.json", cache=False)
    seconds: dict[str, list[float]] = {"official": [], "ours": []}
    cpu_seconds: dict[str, list[float]] = {"official": [], "ours": []}
    worst = 0.0
    for turn in range(rounds):
        folders = write_pairs(root / f"round{turn}", pairs, size, seed=turn * 10**4)
        contestants = {
            "official": lambda folders=folders: official_loop(models, *folders),
            "ours": lambda folders=folders, turn=turn: ours(*folders, root / f"{turn}.json", cache_folder=str(root / "cache")),
        }
        means = {}
        for name in sorted(contestants, reverse=bool(turn % 2)):
            start = time.perf_counter(), time.process_time()
            means[name] = contestants[name]()
            seconds[name].append(time.perf_counter() - start[0])
            cpu_seconds[name].append(time.process_time() - start[1])
        worst = max(worst, *(abs(means["ours"][name] - means["official"][name]) for name in OFFICIAL))
        torch.set_num_threads(threads)
        speeds = ", ".join(f"{name} {pairs / times[-1]:.1f} pairs/s" for name, times in seconds.items())
        print(f"{threads} threads, round {turn}: {speeds}", flush=True)
    ratios = [official / our for official, our in zip(seconds["official"], seconds["ours"], strict=True)]
    return {
        "threads": threads, "pairs": pairs, "size": size, "rounds": rounds, "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "pairs_per_second": {name: pairs / statistics.median(times) for name, times in seconds.items()},
        "cpu_ratio": sum(cpu_seconds["official"]) / sum(cpu_seconds["ours"]),
        "ratio_median": statistics.median(ratios), "ratio_min": min(ratios), "largest_difference_of_means": worst,
    }  # fmt: skip


def memory(root: Path, pairs: int, size: int) -> dict[str, Any]:
    """Resident memory while very many pairs are scored, whose files are links to a few; nothing is cached."""
    sources, reconstructions = write_pairs(root / "few", 50, size, seed=5 * 10**5)
    many = root / "many"
    for folder in (sources, reconstructions):
        (many / folder.name).mkdir(parents=True)
        files = sorted(folder.iterdir())
        for n in range(pairs):
            os.link(files[n % 50], many / folder.name / f"{n:05d}{files[0].suffix}")
    process, curve = psutil.Process(), []
    from uae.bench.score.command import similarities

    add = similarities._Ring.add

    def watched(ring: Any, *details: Any) -> None:
        add(ring, *details)
        count = len(ring.found.names)
        if count == pairs or count >= (len(curve) + 1) * pairs // 20:
            curve.append((count, process.memory_info().rss / MIB))

    similarities._Ring.add = watched
    gc.collect()
    try:
        ours(many / "sources", many / "reconstructions", root / "many.json", cache=False)
    finally:
        similarities._Ring.add = add
    return {
        "pairs": pairs,
        "size": size,
        "rss_mib": curve,
        "growth_mib": max(rss for _, rss in curve[1:]) - curve[1][1],
        "result_mib": (root / "many.json").stat().st_size / MIB,
    }


def markdown(result: dict[str, Any]) -> str:
    """The result in words."""
    races, memory = result["races"], result["memory"]
    size, (seen, settled) = races[0]["size"], memory["rss_mib"][1]
    lines = [
        "# Throughput of protocol 1",
        "",
        f"`OMP_WAIT_POLICY=PASSIVE python benchmarks/speed/scoring.py`: {races[0]['pairs']} pairs of {size} x {size * 3 // 4} "
        f"pixels per round, {races[0]['rounds']} rounds in turns, {result['cores']} cores, tiny random encoders in the layouts of "
        "CLIP, LongCLIP, DINOv2 and DINOv3; nothing in the cache. Pairs per second, medians:",
        "",
        "| threads of torch | official loop | uae.bench score | ratio, median | ratio, least | ratio of CPU seconds "
        "| largest difference of a mean |",
        "|---|---|---|---|---|---|---|",
    ]
    for race in races:
        speed = race["pairs_per_second"]
        lines.append(
            f"| {race['threads']} | {speed['official']:.1f} | {speed['ours']:.1f} | {race['ratio_median']:.2f} | "
            f"{race['ratio_min']:.2f} | {race['cpu_ratio']:.2f} | {race['largest_difference_of_means']:.1e} |"
        )
    lines += [
        "",
        f"Memory: {memory['pairs']} pairs; resident memory from {settled:.0f} MiB (after {seen} pairs) to at most "
        f"{settled + memory['growth_mib']:.0f} MiB, {memory['growth_mib']:.1f} MiB more. The scores themselves, kept for the "
        f"result, are {memory['result_mib']:.1f} MiB as text.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("pairs", 200), ("rounds", 3), ("size", 512), ("memory_pairs", 10_000), ("memory_size", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--parts", nargs="+", choices=("races", "memory"), default=("races", "memory"))
    options = parser.parse_args()
    file = RESULTS / "score_throughput.json"
    result = json.loads(file.read_text()) if file.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        os.environ["UAE_CHECKPOINTS"] = str(root / "checkpoints")
        torch.manual_seed(0)
        for name in OFFICIAL.values():
            ENCODERS[name](root / "checkpoints" / name)
        result["cores"] = len(os.sched_getaffinity(0))
        if "races" in options.parts:
            result["races"] = [race(root / str(n), options.pairs, options.rounds, options.size, n) for n in (1, 2)]
        if "memory" in options.parts:
            result["memory"] = memory(root, options.memory_pairs, options.memory_size)
    file.write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / "score_throughput.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
