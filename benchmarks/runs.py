"""Trainings through the command line, for the benchmarks."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("outputs/miniature")


@dataclass(frozen=True)
class Run:
    """One training through the command line.

    Args:
        name: Of its folder, with the seed.
        seed: Of everything.
        configs: Deltas to the base.
        options: Further arguments.
        base: The complete run.
    """

    name: str
    seed: int
    configs: tuple[str, ...]
    options: tuple[str, ...]
    base: str = "configs/tiny.yaml"

    @property
    def folder(self) -> Path:
        """Where it writes."""
        return RUNS / f"{self.name}_seed{self.seed}"

    def __call__(self, threads: int) -> None:
        """Train, unless it has been done; continue what was interrupted."""
        if (self.folder / "summary.json").is_file():
            return
        files = [part for config in (self.base, *self.configs) for part in ("--config", config)]
        options = [f"--run_name=miniature/{self.folder.name}", f"--seed_everything={self.seed}", "--ckpt_path=last", *self.options]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("w") as log:
            subprocess.run(
                [sys.executable, "-m", "uae.cli", "fit", *files, *options],
                check=True,
                stdout=log,
                stderr=log,
                env=environment,
            )


def train(runs: list[Run], jobs: int) -> None:
    """All runs, several at a time, one line each when done."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    with ThreadPoolExecutor(jobs) as pool:
        for run, _ in zip(runs, pool.map(lambda run: run(threads), runs), strict=True):
            print(f"trained {run.folder}", flush=True)
