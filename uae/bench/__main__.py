"""``python -m uae.bench COMMAND ...``: one module per command, imported when it is asked for.

``UAE_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from uae.cli import fail, one_line_errors

COMMANDS = {
    "score": "Unified-Bench protocol 1: similarity of sources and reconstructions",
    "run": "caption and reconstruct a folder of images with any system",
    "judge": "Unified-Bench protocol 2: which caption do language models prefer",
    "geneval": "GenEval: do images show the objects, counts, colors and places of their prompts",
    "geneval_plus": "GenEval++: the same for longer prompts, told by a judge",
    "dpg": "DPG-Bench: do images show what dense prompts ask for",
    "understanding": "MMMU and MMT-Bench from the samples of lmms-eval, per subtask",
    "report": "several results in one table, beside the paper's",
}

MODULES = {
    "score": "score.command", "run": "run", "judge": "judging.command", "geneval": "geneval.command",
    "geneval_plus": "geneval.plus", "dpg": "dpg.command", "understanding": "understanding.command", "report": "report.command",
}  # fmt: skip


def usage() -> str:
    """All commands, a line each."""
    lines = [f"  {name:14s} {what}" for name, what in COMMANDS.items()]
    return "\n".join(["usage: python -m uae.bench COMMAND ... (COMMAND --help tells more)", "", *lines])


def main(args: Sequence[str] | None = None) -> None:
    """Run one command."""
    name, *rest = (sys.argv[1:] if args is None else list(args)) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return
    if name not in COMMANDS:
        fail(f"unknown command {name!r} of uae.bench; allowed: {', '.join(COMMANDS)}")
    with one_line_errors():
        import_module(f"uae.bench.{MODULES[name]}").main(rest)


if __name__ == "__main__":
    main()
