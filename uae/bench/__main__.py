"""``python -m uae.bench COMMAND ...``: every benchmark is a command in a module of its own, imported when it is called.

``UAE_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from uae.cli import fail, one_line_errors, share_callbacks


class Command(NamedTuple):
    """A command of ``python -m uae.bench``.

    Args:
        module: Module whose ``main(args)`` gets the words behind the command's name.
        summary: One line for the usage text.
    """

    module: str
    summary: str


# A new benchmark is a module with a ``main`` that calls `uae.bench.result.write_result`, a line here, and a test.
COMMANDS = {
    "score": Command("uae.bench.score.command", "Unified-Bench protocol 1: similarity of source images and reconstructions"),
    "run": Command("uae.bench.run", "caption and reconstruct a folder of images with any system"),
    "draw": Command("uae.bench.drawing.command", "draw captions with an image model behind an API, as GPT-4o-Image"),
    "judge": Command("uae.bench.judging.command", "Unified-Bench protocol 2: which caption do language models prefer"),
    "geneval": Command("uae.bench.geneval.command", "GenEval: do images show the objects, counts, colors and places of their prompts"),
    "geneval_plus": Command("uae.bench.geneval.plus", "GenEval++: the same for longer prompts, decided by a language model"),
    "dpg": Command("uae.bench.dpg.command", "DPG-Bench: do images show what dense prompts ask for"),
    "understanding": Command("uae.bench.understanding.command", "MMMU and MMT-Bench from the samples of lmms-eval, per subtask"),
    "report": Command("uae.bench.report.command", "several results in one table, beside the paper's numbers"),
}


def usage() -> str:
    """The usage text: one line per command."""
    lines = [f"  {name:14s} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: python -m uae.bench COMMAND ... (COMMAND --help tells more)", "", *lines])


def main(args: Sequence[str] | None = None) -> None:
    """Run one command.

    Args:
        args: Name of the command and its options; None takes those of the process.
    """
    name, *rest = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        fail(f"unknown command {name!r} of uae.bench; allowed: {', '.join(COMMANDS)}")
    with one_line_errors("make room or correct --output"):
        share_callbacks()
        import_module(COMMANDS[name].module).main(rest)


if __name__ == "__main__":
    main()
