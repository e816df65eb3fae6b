"""Trainings through the command line, for the benchmarks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

RUNS = Path("outputs/claims")
QUIET = ("--trainer.limit_val_batches=0", "--trainer.enable_progress_bar=false")  # what is reported is measured afterwards


@dataclass(frozen=True)
class Run:
    """One training through the command line, on one thread.

    Args:
        name: What the run is, in words; its folder is named after it.
        seed: Seed of the run.
        base: The complete configuration.
        configs: Deltas to the base.
        steps: Optimizer steps.
        options: Further arguments.
        start: The run whose exported adapters this one starts from; None is the cold start.
    """

    name: str
    seed: int
    base: str
    configs: tuple[str, ...]
    steps: int
    options: tuple[str, ...] = ()
    start: Run | None = None

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        words = re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")
        return RUNS / f"{Path(self.base).stem}-{words}-{self.seed}"

    @property
    def export(self) -> Path:
        """The folder of the adapters that the run trained, and of those that it started from."""
        return self.folder / "export"

    def __call__(self) -> Run:
        """Train, unless it has been done; continue what was interrupted."""
        if self.export.is_dir():  # written by a run that has ended, not by one that was interrupted
            return self
        files = [part for config in (self.base, *self.configs) for part in ("--config", config)]
        name = f"--run_name={self.folder.relative_to('outputs').as_posix()}"
        length = (f"--trainer.max_steps={self.steps}", "--ckpt_path=last")
        options = (name, f"--seed_everything={self.seed}", *length, *QUIET, *self.options, *self._adapters())
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "log.txt").open("a") as log:
            subprocess.run(
                [sys.executable, "-m", "uae.cli", "fit", *files, *options],
                check=True,
                stdout=log,
                stderr=log,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        return self

    def _adapters(self) -> list[str]:
        """Options that start from the adapters of another run."""
        if self.start is None:
            return []
        options = []
        if (self.start.export / "adapter_config.json").is_file():
            options.append(f"--model.init_args.finetune.init_args.adapter={self.start.export}")
        if (self.start.export / "renderer").is_dir():
            options += [
                "--model.init_args.image_finetune=uae.models.finetune.LoRA",
                f"--model.init_args.image_finetune.init_args.adapter={self.start.export / 'renderer'}",
            ]
        return options
