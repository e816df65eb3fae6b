"""What the settings of the stages do, on the first miniature, one at a time.

    python benchmarks/ablations.py --seeds 0 1 2

Stage 3 starts from stage 2 of benchmarks/claims.py with the same seed, which is trained if it is not there. Results go to
benchmarks/results/ablations.json and ablations.md.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from claims import FAMILIES, Job, Measured, remembered
from claims_table import cell
from measuring import everything, trained
from results import write
from runs import RUNS, Run

from uae.miniature.tiny import WEIGHTS

TINY = FAMILIES["tiny"]
MODEL = "--model.init_args"
COLUMNS = {
    "unified_score/held_out": "held out", "caption/full": "caption full", "caption/precision": "precision",
    "generation/overall": "mini-GenEval", "reconstruction/faithful": "drawn as it says", "reconstruction/whole": "whole",
}  # fmt: skip
LAYOUT = (
    f"{MODEL}.reward.init_args.parts.layout=uae.rewards.EncoderSimilarity",
    f"{MODEL}.reward.init_args.parts.layout.init_args.encoder=uae.encoders.LayoutEncoder",
    f"{MODEL}.reward.init_args.weights.layout=1.0",
)
GUIDED = f"{MODEL}.system.init_args.guidance=2.0"


def settings(seed: int) -> Iterator[tuple[str, Run]]:
    """Every row of the table: what is changed, and the run."""
    captions, images, joint = (Job("tiny", name, seed).run for name in ("captions", "captions, images", "joint"))

    def with_options(run: Run, name: str, *options: str) -> Run:
        return replace(run, name=name, options=(*run.options, *options))

    yield "stage 2", captions
    yield "stage 2: KL .02", with_options(captions, "captions kl", f"{MODEL}.loss.beta=0.02")
    yield "stage 3", images
    for error in (0.1, 0.2, 0.3):
        weights = f"{MODEL}.system.init_args.weights={decoder_of(error)}"
        second = with_options(captions, f"captions error {error}", weights)
        yield f"error rate {error}: stage 2", second
        yield f"error rate {error}: stage 3", replace(with_options(images, f"images error {error}", weights), start=second)
    for count in (2, 4):
        yield f"stage 3: M {count}", with_options(images, f"m {count}", f"{MODEL}.reconstructions={count}")
    for level in (0.3, 1.0):
        yield f"stage 3: noise {level}", with_options(images, f"noise {level}", f"{MODEL}.exploration.noise_level={level}")
    for window in (1, 2):
        options = (f"{MODEL}.exploration.window={window}", f"{MODEL}.exploration.start=random")
        yield f"stage 3: window {window}, anywhere", with_options(images, f"window {window}", *options)
    yield "stage 3: KL .01", with_options(images, "images kl", f"{MODEL}.image_loss.init_args.beta=0.01")
    full = f"{MODEL}.image_finetune=uae.models.finetune.Full"
    yield "stage 3: full, rate 1e-4", with_options(images, "images full", full, f"{MODEL}.image_lr=1.0e-4")
    yield "stage 3: reward with layout", with_options(images, "images layout", *LAYOUT)
    for update in ("guided", "conditional"):
        option = f"{MODEL}.exploration.guidance_in_update={update}"
        yield f"stage 3: guidance 2, {update} update", with_options(images, f"guidance {update}", GUIDED, option)
    yield "joint", joint
    for weight in (0.5, 2.0):
        yield f"joint: image_weight {weight}", with_options(joint, f"joint weight {weight}", f"{MODEL}.image_weight={weight}")


def decoder_of(error: float) -> Path:
    """The miniature with a decoder continued on captions with another error rate; made if it is not there."""
    folder = RUNS / f"weights-error-{error}"
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(WEIGHTS, folder)
        options = ("--trainer.max_steps=240", f"{MODEL}.folder={folder}", f"--run_name=claims/decoder-error-{error}")
        objective = f"{MODEL}.objective.init_args.error={error}"
        command = [sys.executable, "-m", "uae.cli", "fit", "--config", "configs/pretrain/refine.yaml", *options, objective]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        (folder / "done").touch()
    return folder


def measure(run: Run, count: int) -> Measured:
    """Train and measure one row with one seed, unless it has been done."""
    torch.set_num_threads(1)
    if run.start is not None:
        run.start()
    run()
    weights = next((Path(o.partition("=")[2]) for o in run.options if o.startswith(f"{MODEL}.system.init_args.weights")), None)
    guidance = 2.0 if GUIDED in run.options else 1.0
    path = run.folder / f"measured_{count}.json"
    return remembered(path, lambda: everything(trained("tiny", run.export, weights=weights, guidance=guidance), count, run.seed))


def main(arguments: argparse.Namespace) -> None:
    """Train, measure, write."""
    rows = [row for seed in arguments.seeds for row in settings(seed)]
    found: dict[str, list[dict[str, float]]] = {name: [] for name, _ in rows}
    rows.sort(key=lambda row: row[1].start is not None)  # stage 2 before stage 3
    with ProcessPoolExecutor(arguments.jobs) as pool:
        measured = pool.map(measure, [run for _, run in rows], [arguments.scenes] * len(rows))
        for (name, run), scores in zip(rows, measured, strict=True):
            found[name].append(scores["greedy"])
            print(f"seed {run.seed}: {name}", flush=True)
    table = ["| | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, scores in found.items():
        table.append(f"| {name} | " + " | ".join(cell(tag, [one[tag] for one in scores]) for tag in COLUMNS) + " |")
    print("\n".join(table))
    write("ablations", {"scenes": arguments.scenes, "seeds": arguments.seeds, "rows": found}, "\n".join(table))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--scenes", type=int, default=256, help="scenes and questions; a multiple of 4")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, each on one thread")
    main(parser.parse_args())
