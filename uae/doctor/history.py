"""How a run began and ended: its end, its checkpoints, the images it left out, and where it hung."""

from __future__ import annotations

from collections.abc import Iterator

from uae.doctor.finding import Finding, note, ok, wrong
from uae.doctor.run_folder import Run


def check_history(run: Run) -> list[Finding]:
    """The findings about the course of a run."""
    return [*ending(run), *checkpoints(run), *hangs(run), *images(run)]


def ending(run: Run) -> Iterator[Finding]:
    """Whether the run has reached its last step."""
    if run.running:
        yield note(f"{run.folder} is running: a process holds its lock")
        return
    last, most = _last_step(run), run.setting("trainer.max_steps", -1)
    goes_on = "the same command with --ckpt_path last goes on" if run.step is not None else "the same command starts again"
    if not run.config:
        yield wrong("there is no config.yaml: the run ended before it began", "start it again, and read its last line")
    elif not run.summary:
        cause = "was preempted" if (run.folder / "checkpoints" / "preempted.ckpt").exists() else "was killed before its end"
        yield wrong(f"no summary.json: the run {cause}, at step {last} of {most}", goes_on)
    elif 0 <= run.summary.get("steps", 0) < most:
        yield wrong(f"the run was interrupted at step {run.summary['steps']} of {most}", goes_on)
    else:
        yield ok(f"the run has ended after {run.summary.get('steps')} steps and {run.summary.get('seconds', 0):.0f} s")


def checkpoints(run: Run) -> Iterator[Finding]:
    """Whether the run can go on from a checkpoint."""
    if run.fault:
        yield wrong(run.fault, "copy a whole checkpoint there, or start anew with another run_name")
    elif run.step is not None:
        yield ok(f"the furthest checkpoint is of step {run.step}")
    elif run.scalars and not run.running:
        yield note("there is no checkpoint", "add callbacks.checkpoint.RolloutCheckpoint to trainer.callbacks")
    if run.partial and not run.running:
        yield note(f"the process was killed while it wrote {', '.join(run.partial)}", "a run that goes on removes it")


def hangs(run: Run) -> Iterator[Finding]:
    """Stacks that ranks have written because something took too long."""
    if run.stacks:
        cure = "the rank whose stack is not in a collective is the one that the others wait for; docs/health.md"
        yield wrong(f"a step took longer than the limit of callbacks.watchdog.Watchdog: see {', '.join(run.stacks)}", cure)


def images(run: Run) -> Iterator[Finding]:
    """Images that were left out."""
    for reason, count in sorted(run.skipped.items(), key=lambda item: -item[1])[:3]:
        yield note(f"{count} images were left out: {reason[:100]}; names in skipped.rank*.jsonl")


def _last_step(run: Run) -> int:
    """The last step that the folder knows of."""
    return max([step for series in run.scalars.values() for step, _ in series] + [run.step or 0])
