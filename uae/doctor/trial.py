"""A run of the miniature of two steps, in a process and a folder of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from uae.doctor.finding import Finding, ok, wrong
from uae.doctor.run_folder import read_run
from uae.files.packaged import PACKAGE

LIMIT = 300.0  # seconds; a laptop takes 10 to 30
WORDS = ["--config", "tiny", "--config", "debug/fast", "--trainer.max_steps=2", "--trainer.limit_val_batches=0"]
WORDS += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


def check_rollout(limit: float = LIMIT) -> Finding:
    """Whether the miniature captions, draws, rewards and learns.

    Args:
        limit: Seconds after which the run counts as hanging.
    """
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "uae.cli", "fit", *WORDS, "--trainer.default_root_dir", folder]
        by_hand = "python -m uae.cli fit --config tiny --config debug/fast shows all of it"
        try:
            done = subprocess.run(
                command, cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=limit
            )
        except subprocess.TimeoutExpired:
            return wrong(f"the miniature was not done after {limit:.0f} s", f"too many threads? OMP_NUM_THREADS=1; {by_hand}")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return wrong(f"the miniature ended with status {done.returncode}: {last}", by_hand)
        scalars = read_run(Path(folder, "tiny")).scalars
    reward, gap = (scalars[tag][0][1] for tag in ("reward/mean", "policy/sampler_gap"))
    return ok(f"the miniature took two steps in {time.monotonic() - start:.0f} s: reward {reward:.2f}, ratio off by {gap:.0e}")
