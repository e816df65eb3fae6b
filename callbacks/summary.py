"""Reports all validation metrics before and after the training."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from uae.module import UnifiedGRPO
from uae.trainer import is_dry_run

Scores = dict[str, float]


class Summary(Callback):
    """Writes ``summary.json`` (``before``, ``after``, ``steps``, ``seconds``, ``stages``) to the log directory and prints it.

    ``before`` is the validation that Lightning runs ahead of the first step (``trainer.num_sanity_val_steps: -1``, the
    command line's default); it also becomes the first point of the TensorBoard curves. Checkpoints contain it, so a
    resumed run compares with the original start. There is always a validation after the last step. An interrupted run
    reports its last validation. ``stages`` are the seconds of each stage of rollouts and updates, ``time/*`` added up; what is
    left of ``seconds`` went into validations, checkpoints and data.
    """

    def __init__(self) -> None:
        self.before: Scores = {}
        self.after: Scores = {}
        self.seconds = 0.0  # of earlier parts of a resumed run
        self.stages: Counter[str] = Counter()  # likewise
        self._start, self._now = 0.0, Counter[str]()  # of this part
        self._folder: Path | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the log directory while all ranks are here: the answer is a broadcast."""
        self._folder = Path(trainer.log_dir) if trainer.log_dir and not is_dry_run(trainer) else None

    def state_dict(self) -> dict[str, Any]:
        """The start of the run and its times, for checkpoints."""
        return {"before": self.before, "seconds": self._elapsed(), "stages": dict(self.stages + self._now)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics and the time of a resumed run."""
        self.before, self.seconds = state_dict["before"], state_dict["seconds"]
        self.stages = Counter(state_dict.get("stages", {}))  # checkpoints of before have none

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the metrics of this validation."""
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if trainer.sanity_checking:
            self.before = metrics
            if trainer.logger is not None:
                trainer.logger.log_metrics(metrics, step=0)  # Lightning itself does not log this validation
        else:  # callback_metrics contains training metrics too
            self.after = {name: value for name, value in metrics.items() if name in self.before or not self.before}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start = time.monotonic()
        if isinstance(pl_module, UnifiedGRPO):
            self._now = pl_module.seconds

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Ask for a stop at the last step: Lightning then validates, whatever the validation interval."""
        if 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write and print."""
        self._report(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what an interrupted run has."""
        if isinstance(exception, KeyboardInterrupt) and self._start:
            self._report(trainer)

    def _report(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero or self._folder is None:
            return
        seconds, stages = round(self._elapsed(), 3), {stage: round(s, 3) for stage, s in (self.stages + self._now).items()}
        summary = {"before": self.before, "after": self.after, "steps": trainer.global_step, "seconds": seconds, "stages": stages}
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(table(self.before, self.after, trainer.global_step, seconds, stages))

    def _elapsed(self) -> float:
        return self.seconds + (time.monotonic() - self._start if self._start else 0.0)


def table(before: Scores, after: Scores, steps: int, seconds: float, stages: Mapping[str, float]) -> str:
    """Metrics, one per line: name, before, after, change; then where the time went."""
    names = list(dict.fromkeys([*before, *after]))
    width = max(map(len, names), default=0)
    lines = [f"{'':{width}}  {'before':>9}  {'after':>9}  {'change':>9}"]
    for name in names:
        old, new = before.get(name), after.get(name)
        change = "" if old is None or new is None else f"{new - old:+9.4f}"
        lines.append(f"{name:{width}}  {_number(old)}  {_number(new)}  {change:>9}")
    lines.append(f"{steps} steps in {seconds:.0f} s")
    if stages:
        rest = {"validation and all else": max(0.0, seconds - sum(stages.values()))}
        largest = sorted(stages.items(), key=lambda one: -one[1])
        lines.append("of these: " + ", ".join(f"{stage} {s:.0f} s" for stage, s in [*largest, *rest.items()] if s >= 0.5))
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return " " * 9 if value is None else f"{value:9.4f}"
