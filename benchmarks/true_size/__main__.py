"""One rollout and one update of systems at their published sizes, with random weights in bfloat16, beside plan and floors.

    python -m benchmarks.true_size --device cpu --batch 1 --group 2 --tokens 16 --steps 2 --size 256

The code that runs is a user's: `UnifiedGRPO` in Lightning's trainer with the adapter of ``configs/finetune/lora_pretrained.yaml`` and
a CLIP reward. Every system runs in a process of its own. One that does not fit is a row of the table, not the end.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import write
from benchmarks.true_size.measure import measured
from benchmarks.true_size.systems import CASES, DEFAULT

ROOT = Path(__file__).parents[2]
GIB = 2**30
LIBRARIES = ("torch", "lightning", "transformers", "diffusers", "peft")


def alone(case: str, words: list[str], minutes: float) -> dict[str, Any]:
    """One system, in a process of its own; its last line is what was found."""
    command = [sys.executable, "-m", "benchmarks.true_size", *words, "--case", case]
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60 * minutes)
    except subprocess.TimeoutExpired:
        return {"case": case, "failed": f"not done after {minutes:g} minutes"}
    if done.returncode:
        why = "killed by the system, which ends processes if memory is short" if done.returncode == -9 else done.stderr[-500:]
        return {"case": case, "failed": why}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def surroundings(device: str) -> dict[str, Any]:
    """Hardware, versions, and revision of the code."""
    revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout.strip()
    name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{library: importlib.metadata.version(library) for library in LIBRARIES},
        "revision": revision,
    }


def markdown(report: dict[str, Any]) -> str:
    """The report as tables, one per system."""
    where, sizes = report["surroundings"], report["sizes"]
    lines = [
        f"# Systems at their published sizes on {where['device']}",
        "",
        f"Random weights in bfloat16. {sizes['batch']} images x {sizes['group']} captions of {sizes['tokens']} tokens, "
        f"{sizes['steps']} denoising steps, {sizes['size']} pixels; the last of {sizes['rollouts']} rollouts and its update.",
        "",
        ", ".join(f"{key} {value}" for key, value in where.items() if key != "device"),
    ]
    for one in report["cases"]:
        lines += ["", f"## {one['case']}", ""] + (_failure(one) if "failed" in one else _table(one))
    return "\n".join(lines)


def _failure(one: dict[str, Any]) -> list[str]:
    plan = "".join(f" {stage} {size / GIB:.1f};" for stage, size in one.get("plan", {}).items())
    return [f"Failed: {one['failed']}." + (f" GiB by plan:{plan}" if plan else "")]


def _table(one: dict[str, Any]) -> list[str]:
    lines = ["| stage | seconds | floor, s | ratio | peak, GiB | plan, GiB |", "|---|---|---|---|---|---|"]
    for stage, seconds in one["seconds"].items():
        floor, peak, plan = (one[key].get(stage) for key in ("floors", "peaks", "plan"))
        cells = [f"{seconds:.2f}", f"{floor:.3f}" if floor else "", f"{seconds / floor:.1f}" if floor else ""]
        cells += ["" if size is None else f"{size / GIB:.2f}" for size in (peak, plan)]
        lines.append(f"| {stage} | {' | '.join(cells)} |")
    rates = one["peak_rates"]
    words = (
        f"{one['tokens_per_second']:.1f} caption tokens/s, {one['images_per_second']:.2f} images/s. Largest difference between the "
        f"sampler's and the update's log-probs, as a ratio: {one['sampler_gap']:.3g}. Floors are for {rates['name']}: "
        f"{rates['flop'] / 1e12:.3g} TFLOP/s, {rates['bandwidth'] / 1e9:.4g} GB/s. Before the system was built, the process had "
        f"{one['before'] / GIB:.2f} GiB, which peaks do not include."
    )
    return [*lines, "", words]


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.true_size", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=sorted(DEFAULT), default="cpu")
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), help="default: those that suit the device")
    for name, default, what in (
        ("batch", 1, "images"), ("group", 2, "captions per image"), ("tokens", 16, "of a caption"), ("steps", 2, "of denoising"),
        ("size", 256, "pixels of a side"), ("rollouts", 1, "the last one is reported; the first warms up if there are several"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{what} (default {default})")
    parser.add_argument("--minutes", type=float, default=8, help="longest time of one system (default 8)")
    parser.add_argument("--case", choices=sorted(CASES), help="run this one here, and print its numbers")
    options = parser.parse_args(arguments)
    sizes = {name: getattr(options, name) for name in ("batch", "group", "tokens", "steps", "size", "rollouts")}
    if options.case:
        print(json.dumps(measured(options.case, options.device, sizes)))
        return
    words = [word for name, value in [("device", options.device), *sizes.items()] for word in (f"--{name}", str(value))]
    cases = []
    for case in options.cases or DEFAULT[options.device]:
        cases.append(alone(case, words, options.minutes))
        print(case, cases[-1].get("failed") or cases[-1]["seconds"], flush=True)
    report = {"surroundings": surroundings(options.device), "sizes": sizes, "cases": cases}
    name = "true_size_gpu" if options.device == "cuda" else "true_size_cpu"
    write(name, report, markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
