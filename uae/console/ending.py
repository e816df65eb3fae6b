"""What to do with a run that has ended: where everything is, and the commands to look at it, to continue it and to use it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

COMMAND = "python -m uae.cli"
REPLACED = ("--ckpt_path", "--trainer.max_steps")  # options that the command to continue gives anew
LOOK_FIRST = ("report.html", "stages.md", "examples.png", "summary.json", "export", "checkpoints")


def ending(folder: Path, result: Path, words: Sequence[str], max_steps: int, tensorboard: bool) -> str:
    """A few lines of text.

    Args:
        folder: The folder of the run; of a chain of stages, that of the first.
        result: The folder of the run; of a chain of stages, that of the last.
        words: The command line behind ``python -m uae.cli``.
        max_steps: ``trainer.max_steps`` of the run; the command to continue doubles it. Below 1 there is no such command.
        tensorboard: Whether there are events of TensorBoard.
    """
    last = result / "checkpoints/last.ckpt"
    there = [name for name in LOOK_FIRST if (folder / name).exists()]
    lines = {"folder": f"{folder} ({', '.join(there)})" if there else str(folder)}
    if tensorboard:
        lines["look"] = _words("tensorboard", "--logdir", str(folder.parent))
    if last.exists() and folder == result and max_steps > 0:
        kept = without(words, REPLACED)
        lines["continue"] = _words(*COMMAND.split(), *kept, "--ckpt_path", str(last), "--trainer.max_steps", str(2 * max_steps))
    if last.exists() and (result / "config.yaml").exists():
        data = ["--config", "configs/data/folder.yaml", "--data.init_args.predict_root", "IMAGES"]
        lines["use"] = _words(*COMMAND.split(), "predict", "--config", str(result / "config.yaml"), *data, "--ckpt_path", str(last))
    width = max(map(len, lines)) + 1
    return "\n".join(f"{name + ':':{width}} {line}" for name, line in lines.items())


def without(words: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line without some options, each of which has one value: ``--option value`` or ``--option=value``."""
    kept, rest = [], iter(words)
    for word in rest:
        if word in options:
            next(rest, "")
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def _words(*words: str) -> str:
    return shlex.join(words)
