"""How far a run is: a bar on a terminal, a line now and then where there is none."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

from uae.stopwatch import tell
from uae.trainer import current_metrics

STAGES = {  # of a rollout, as `uae.rollout` measures them
    "caption": "writing captions",
    "condition": "reading captions",
    "render": "drawing",
    "reward": "rewarding",
    "reference": "asking the reference",
    "replay": "log-probs",
    "update": "updating",
}
REFRESH = 0.3  # seconds between two looks of the bar
OF_A_VALIDATION = ("val_reward/mean", "unified_score/held_out", "val_loss", "understanding/overall", "generation/overall")


class Progress(ProgressBar):
    """Shows stage, step, reward (whatever is logged with ``prog_bar``) and remaining time.

    On a terminal this is one bar for the whole run. Elsewhere (a batch job, a pipe, a notebook) it is a line after the first rollout,
    then one every ``every`` seconds, and one per validation. The command line adds it unless ``trainer.callbacks`` has another
    progress bar or ``trainer.enable_progress_bar`` is false.

    Args:
        every: Seconds between two lines where there is no terminal, 0 or more.
        terminal: Whether there is one; None asks the system.
    """

    def __init__(self, every: float = 30.0, terminal: bool | None = None) -> None:
        super().__init__()
        if every < 0:
            raise ValueError(f"every={every} seconds of uae.console.progress.Progress; allowed: 0 or more")
        self.every = every
        self.terminal = sys.stderr.isatty() if terminal is None else terminal
        self._enabled = True
        self._bar: Any = None
        self._doing, self._total, self._first = "", 0.0, 0
        self._begun = self._shown = self._validating = 0.0  # times
        self._untold = True  # whether no step has been shown yet
        self._stop_listening: Callable[[], None] = lambda: None

    def enable(self) -> None:
        """Show it."""
        self._enabled = True

    def disable(self) -> None:
        """Show nothing, as on all processes but the first."""
        self._enabled = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to listen to the stages of rollouts."""
        super().setup(trainer, pl_module, stage)
        self._stop_listening()
        if self._enabled:
            self._stop_listening = tell(lambda name: self._do(STAGES.get(name, name)))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        self._stop_listening()
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The message of the error begins on a line of its own."""
        self._stop_listening()
        self._close()

    # --------------------------------------------------------------------------------------------------------- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how many steps there are."""
        self._first, self._total = trainer.global_step, float(trainer.estimated_stepping_batches)
        self._begun = self._shown = time.monotonic()
        self._untold = True
        self._open("steps", self._total, self._first)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        """The rollout is over."""
        self._do(STAGES["update"])

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Count optimizer steps."""
        at_first = self._untold and (batch_idx + 1) % getattr(pl_module, "batches_per_rollout", 1) == 0
        if self._enabled and (self._due() or at_first):
            self._untold = False
            self._say_step()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the last step."""
        if self._enabled:
            self._say_step()
            self._close()

    # ----------------------------------------------------------------------------------------- validation and the others

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock of a validation."""
        self._validating = time.monotonic()
        self._do("validating")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Say which batch it is."""
        self._do(f"validating, batch {batch_idx + 1}")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """One line with what it found."""
        metrics = {name: float(trainer.callback_metrics[name]) for name in OF_A_VALIDATION if name in current_metrics(trainer)}
        found = ", ".join(f"{name} {value:.3f}" for name, value in metrics.items())
        when = "before training" if trainer.sanity_checking else f"at step {trainer.global_step}"
        self._print(f"validation {when}: {found or 'done'} ({_clock(time.monotonic() - self._validating)})")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how many batches there are."""
        self._count_batches("test batches", trainer.num_test_batches)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learn how many batches there are."""
        self._count_batches("batches", trainer.num_predict_batches)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Count batches."""
        if self._enabled and self._due():
            self._say_batch(batch_idx + 1)

    on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The table that follows begins on a line of its own."""
        self._close()

    on_predict_end = on_test_end

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print without breaking the bar."""
        self._print(" ".join(map(str, args)))

    # ------------------------------------------------------------------------------------------------------ what is shown

    def _open(self, unit: str, total: float, first: int = 0) -> None:
        self._close()
        if self._enabled and self.terminal:
            shape = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit}{postfix}"
            known = int(total) if math.isfinite(total) else None
            self._bar = tqdm(total=known, initial=first, unit=unit, bar_format=shape, dynamic_ncols=True, file=sys.stderr)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _count_batches(self, unit: str, batches: list[int | float]) -> None:
        self._first, self._total, self._begun, self._shown = 0, float(sum(batches)), time.monotonic(), 0.0
        self._open(unit, self._total)

    def _due(self) -> bool:
        return time.monotonic() >= self._shown + (REFRESH if self.terminal else self.every)

    def _do(self, what: str) -> None:
        """Say what begins; without a terminal only if nothing has been said for a while."""
        self._doing = what
        if not self._enabled or not self._due():
            return
        if self._bar is not None:
            self._shown = time.monotonic()
            self._bar.set_description_str(what)
        elif not self.terminal and self.trainer.training:
            self._print(f"step {self.trainer.global_step}: {what}")

    def _say_step(self) -> None:
        numbers = {name.removesuffix("/mean"): float(value) for name, value in self.trainer.progress_bar_metrics.items()}
        self._say(self.trainer.global_step, "step", "".join(f"  {name} {value:.3f}" for name, value in numbers.items()))

    def _say_batch(self, done: int) -> None:
        self._say(done, "batch", "")

    def _say(self, done: int, unit: str, numbers: str) -> None:
        self._shown = time.monotonic()
        pace = (self._shown - self._begun) / max(done - self._first, 1)
        left = pace * (self._total - done)
        known = f"  {_clock(left)} left" if math.isfinite(left) and done < self._total else ""
        if self._bar is not None:
            self._bar.set_description_str(self._doing, refresh=False)
            self._bar.set_postfix_str((numbers + known).strip(), refresh=False)
            self._bar.update(done - self._bar.n)
            self._bar.refresh()
        elif not self.terminal:
            of = f"/{self._total:.0f}" if math.isfinite(self._total) else ""
            self._print(f"{unit} {done}{of}{numbers}  {pace:.2f} s per {unit}{known}")

    def _print(self, line: str) -> None:
        """A line for the log, above the bar if there is one."""
        if not self._enabled:
            return
        self._shown = time.monotonic() if not self.terminal else self._shown
        if self._bar is not None:
            self._bar.write(line, file=sys.stdout)
        else:
            print(line, flush=True)


def _clock(seconds: float) -> str:
    """Seconds as hours, minutes and seconds: 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
