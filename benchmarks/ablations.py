"""What the settings of the stages do, on the first miniature, one at a time.

    python benchmarks/ablations.py --seeds 0 1 2

Stage 3 starts from stage 2 of benchmarks/claims.py with the same seed (run if it is not there). Results go to
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
from pathlib import Path

import torch
from claims import CAPTIONS, FAMILIES, IMAGES, JOINT, Job, Measured, remembered
from claims_table import cell
from measuring import everything, trained
from results import write
from runs import RUNS, Run

from uae.miniature.tiny import WEIGHTS

TINY = FAMILIES["tiny"]
COLUMNS = {
    "unified_score/held_out": "held out", "caption/full": "caption full", "caption/precision": "precision",
    "generation/overall": "mini-GenEval", "reconstruction/faithful": "drawn as it says", "reconstruction/whole": "whole",
}  # fmt: skip
EXPLORATION = "--model.init_args.exploration.init_args" if False else "--model.init_args.exploration"
FULL = "uae.models.finetune.Full"
LAYOUT = ("--model.init_args.reward.init_args.parts.layout=uae.rewards.EncoderSimilarity",)


def images(name: str, seed: int, *options: str) -> Run:
    """Stage 3 with other settings, after the claims' stage 2."""
    return Run(name, seed, TINY.base, (IMAGES,), TINY.images, options, Job("tiny", "captions", seed).run)


def settings(seed: int) -> Iterator[tuple[str, Run]]:
    """Every row of the table, but those of other decoders: what is changed, and the run."""
    yield "stage 2", Job("tiny", "captions", seed).run
    yield "stage 3", Job("tiny", "captions, images", seed).run
    for count in (2, 4):
        yield f"stage 3: M {count} instead of 8", images(f"m {count}", seed, f"--model.init_args.reconstructions={count}")
    for level in (0.4, 1.0):
        yield f"stage 3: noise {level} instead of .7", images(f"noise {level}", seed, f"{EXPLORATION}.noise_level={level}")
    for window in (1, 2, 3):
        yield f"stage 3: window {window}", images(f"window {window}", seed, f"{EXPLORATION}.window={window}", f"{EXPLORATION}.start=random")


def decoder_of(error: float) -> Path:
    """The miniature with a decoder continued on captions with another error rate; made if it is not there."""
    folder = RUNS / f"weights-error-{error}"
    if not (folder / "done").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(WEIGHTS, folder)
        options = ("--trainer.max_steps=240", f"--model.init_args.folder={folder}", f"--run_name=claims/decoder-error-{error}")
        objective = f"--model.init_args.objective.init_args.error={error}"
        command = [sys.executable, "-m", "uae.cli", "fit", "--config", "configs/pretrain/refine.yaml", *options, objective]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
        (folder / "done").touch()
    return folder
